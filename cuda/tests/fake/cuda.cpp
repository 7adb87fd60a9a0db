// A stand-in for the CUDA driver: memory is host memory, nothing runs, and every call of interest is written to a log that
// the test reads. Calls can be told to fail with a code.
//
// Handles carry their context, so that a call with the wrong context current fails as it would on a GPU.
//
// With FAKE_CUDA_ORDER=1 it also keeps and writes down the order between streams: what each stream and event is called, records
// and waits, what it allocates and frees, and, in a capture, which node comes after which, so that a stream that is not joined
// fails it, one that has captured nothing included.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

typedef unsigned Result;
typedef uint64_t Address;

enum : Result {
    OK = 0,
    INVALID_VALUE = 1,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
};

struct Context {
    int device;
};
struct Module {
    Context* context;
    std::string image;
};
struct Function {
    Module* module;
    std::string name;
    int dynamic_shared;
};
struct Stream;
struct Graph {
    std::vector<std::string> nodes;  // without text where another stream joins the capture
    bool broken;
    std::vector<std::set<size_t>> before;  // of each node, the nodes right before it
    std::vector<Stream*> streams;
};
struct Stream {
    Context* context;
    Graph* capturing;
    unsigned id;
    std::set<size_t> last;  // nodes that the next one comes after
    bool stuck;             // what is enqueued from now on never becomes complete
};
struct Event {
    Context* context;
    unsigned flags;
    bool recorded;
    unsigned id;
    Graph* graph;  // that it was recorded in
    std::set<size_t> last;
    bool stuck;
};

static std::mutex mutex;
static std::string log_text, taken_text;
static std::map<std::string, Result> failures;
static std::vector<size_t> parameter_sizes = {8, 8, 4};
static std::vector<float> elapsed_times;  // round and round
static size_t elapsed_asked = 0;
static Context contexts[2] = {{0}, {1}};
static thread_local Context* current = nullptr;
// While set, nothing that was enqueued ever becomes complete.
static std::atomic<bool> stuck;

static void note(const std::string& line) {
    std::lock_guard<std::mutex> lock(mutex);
    log_text += line + "\n";
}

// The result that the test asked for, else OK.
static Result outcome(const char* call) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = failures.find(call);
    return found == failures.end() ? OK : found->second;
}

static int environment(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static bool keeps_order() { return environment("FAKE_CUDA_ORDER", 0) == 1; }

static unsigned next_id() {
    static unsigned last = 0;
    std::lock_guard<std::mutex> lock(mutex);
    return ++last;
}

#define TRY(call)                                          \
    do {                                                   \
        if (Result result = outcome(call)) return result;  \
    } while (false)

#define IN_CONTEXT(context_of_handle) \
    if (!current || current != (context_of_handle)) return INVALID_CONTEXT

static std::string number(uint64_t value) { return std::to_string(value); }

static std::string name_of(const Stream* stream) { return number(stream ? stream->id : 0); }

// Which stream a copy goes on, where the order between streams is written down.
static std::string on(const Stream* stream) { return keeps_order() ? " stream=" + name_of(stream) : ""; }

static std::string hex(const void* bytes, size_t count) {
    std::string text;
    char pair[3];
    for (size_t i = 0; i < count; ++i) {
        snprintf(pair, sizeof pair, "%02x", static_cast<const unsigned char*>(bytes)[i]);
        text += pair;
    }
    return text;
}

// Work on a stream: written down, or recorded if the stream is capturing.
static Result enqueue(Stream* stream, const std::string& line) {
    if (stream) IN_CONTEXT(stream->context);
    if (!stream && !current) return INVALID_CONTEXT;
    if (stream && stream->capturing) {
        Graph* graph = stream->capturing;
        graph->before.push_back(stream->last);
        stream->last = {graph->nodes.size()};
        graph->nodes.push_back(line);
        note("captured " + line);
    } else {
        note(line);
    }
    return OK;
}

extern "C" {

// ---- for the test ----

const char* fake_take_log() {
    std::lock_guard<std::mutex> lock(mutex);
    taken_text = log_text;
    log_text.clear();
    return taken_text.c_str();
}
void fake_fail(const char* call, Result code) {
    std::lock_guard<std::mutex> lock(mutex);
    if (code)
        failures[call] = code;
    else
        failures.erase(call);
}
void fake_stuck(unsigned value) { stuck = value != 0; }
// The same of one stream, and of what waits for it.
void fake_stick(Stream* stream) { stream->stuck = true; }
void fake_parameters(const size_t* sizes, size_t count) {
    std::lock_guard<std::mutex> lock(mutex);
    parameter_sizes.assign(sizes, sizes + count);
}
void fake_elapsed(const float* milliseconds, size_t count) {
    std::lock_guard<std::mutex> lock(mutex);
    elapsed_times.assign(milliseconds, milliseconds + count);
    elapsed_asked = 0;
}

// ---- driver and devices ----

Result cuInit(unsigned) { return OK; }
Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return OK;
}
Result cuDeviceGetCount(int* count) {
    *count = 2;
    return OK;
}
Result cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || ordinal > 1) return 101;
    *device = ordinal;
    return OK;
}
Result cuDeviceGetName(char* name, int size, int) {
    snprintf(name, static_cast<size_t>(size), "Stand-in");
    return OK;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 16: *value = 132; return OK;
        // Device 0 is what the test wants, device 1 an sm_80.
        case 75: *value = device == 0 ? environment("FAKE_CUDA_MAJOR", 9) : 8; return OK;
        case 76: *value = 0; return OK;
        case 97: *value = 232448; return OK;
        case 113: *value = environment("FAKE_CUDA_READ_ONLY", 1); return OK;
        case 115: *value = 1; return OK;  // memory pools
        default: return INVALID_VALUE;
    }
}

// ---- contexts ----

Result cuDevicePrimaryCtxRetain(Context** context, int device) {
    TRY("cuDevicePrimaryCtxRetain");
    *context = &contexts[device];
    return OK;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxGetCurrent(Context** context) {
    *context = current;
    return OK;
}
Result cuCtxSetCurrent(Context* context) {
    TRY("cuCtxSetCurrent");
    current = context;
    return OK;
}
Result cuCtxSynchronize() {
    TRY("cuCtxSynchronize");
    note("cuCtxSynchronize");
    return OK;
}

// ---- modules and functions ----

Result cuModuleLoadData(Module** module, const void* image) {
    TRY("cuModuleLoadData");
    if (!current) return INVALID_CONTEXT;
    *module = new Module{current, static_cast<const char*>(image)};
    note("cuModuleLoadData device=" + number(current->device) + " " + (*module)->image);
    return OK;
}
Result cuModuleUnload(Module* module) {
    IN_CONTEXT(module->context);
    note("cuModuleUnload");
    delete module;
    return OK;
}
Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    TRY("cuModuleGetFunction");
    *function = new Function{module, name, 48 * 1024};
    return OK;
}
Result cuFuncSetAttribute(Function* function, int attribute, int value) {
    TRY("cuFuncSetAttribute");
    IN_CONTEXT(function->module->context);
    note("cuFuncSetAttribute " + function->name + " " + number(attribute) + "=" + number(value));
    if (attribute == 8) function->dynamic_shared = value;
    return OK;
}
Result cuFuncGetAttribute(int* value, int attribute, Function* function) {
    TRY("cuFuncGetAttribute");
    IN_CONTEXT(function->module->context);
    switch (attribute) {
        case 0: *value = 1024; return OK;
        case 1: *value = 256; return OK;  // static shared memory
        case 3: *value = 24; return OK;   // local memory
        case 4: *value = 40; return OK;   // registers
        default: return INVALID_VALUE;
    }
}
// Both are of drivers from CUDA 12.4 on.
#ifndef NO_PARAM_INFO
Result cuFuncLoad(Function* function) {
    TRY("cuFuncLoad");
    IN_CONTEXT(function->module->context);
    note("cuFuncLoad " + function->name);
    return OK;
}
Result cuFuncGetParamInfo(Function*, size_t index, size_t* offset, size_t* size) {
    TRY("cuFuncGetParamInfo");
    if (index >= parameter_sizes.size()) return INVALID_VALUE;
    *offset = 0;
    *size = parameter_sizes[index];
    return OK;
}
#endif
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads, size_t shared) {
    IN_CONTEXT(function->module->context);
    *blocks = static_cast<int>(2048 / threads - shared / 65536);
    return OK;
}

// ---- launch: the layout of CUlaunchConfig and CUlaunchAttribute in cuda.h ----

struct LaunchAttribute {
    unsigned id;
    char pad[4];
    union {
        char pad64[64];
        unsigned words[16];
    } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "as in cuda.h");
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    LaunchAttribute* attributes;
    unsigned count;
};
static_assert(sizeof(LaunchConfig) == 56, "as in cuda.h");

Result cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** parameters, void** extra) {
    TRY("cuLaunchKernelEx");
    IN_CONTEXT(function->module->context);
    if (extra) return INVALID_VALUE;
    if (static_cast<int>(config->shared) > function->dynamic_shared) return INVALID_VALUE;
    for (int i = 0; i < 3; ++i)
        if (config->grid[i] == 0 || config->block[i] == 0) return INVALID_VALUE;
    auto extent = [](const unsigned (&e)[3]) { return number(e[0]) + "," + number(e[1]) + "," + number(e[2]); };
    std::string line = "cuLaunchKernelEx " + function->name + " grid=" + extent(config->grid) +
                       " block=" + extent(config->block) + " shared=" + number(config->shared) + " attributes=[";
    for (unsigned i = 0; i < config->count; ++i) {
        const LaunchAttribute& attribute = config->attributes[i];
        line += (i ? " " : "") + number(attribute.id) + ":" + number(attribute.value.words[0]);
        if (attribute.id == 4) line += "," + number(attribute.value.words[1]) + "," + number(attribute.value.words[2]);
        // What an attribute does not use has to be zero: it may mean something to a later driver.
        for (size_t word = attribute.id == 4 ? 3 : 1; word < 16; ++word)
            if (attribute.value.words[word]) return INVALID_VALUE;
    }
    line += "] parameters=[";
    for (size_t i = 0; i < parameter_sizes.size(); ++i)
        line += (i ? " " : "") + hex(parameters[i], parameter_sizes[i]);
    line += "] stream=";
    line += keeps_order() ? name_of(config->stream) : config->stream ? "caller's" : "default";
    return enqueue(config->stream, line);
}

// ---- tensor maps: here the address, then bytes that mark a map ----

Result cuTensorMapEncodeTiled(void* map, int type, unsigned rank, Address address, const uint64_t* extents,
                              const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave, int swizzle,
                              int promotion, int fill) {
    TRY("cuTensorMapEncodeTiled");
    if (!current) return INVALID_CONTEXT;
    if (reinterpret_cast<uintptr_t>(map) % 128 || address % 16 || rank < 2 || rank > 3) return INVALID_VALUE;
    memset(map, 0x5a, 128);
    memcpy(map, &address, sizeof address);
    const auto list = [](const auto* numbers, unsigned count) {
        std::string text = number(numbers[0]);
        for (unsigned i = 1; i < count; ++i) text += "," + number(numbers[i]);
        return text;
    };
    note("cuTensorMapEncodeTiled type=" + number(type) + " extents=" + list(extents, rank) + " stride=" +
         list(strides, rank - 1) + " box=" + list(box, rank) + " steps=" + list(steps, rank) + " interleave=" + number(interleave) + " swizzle=" + number(swizzle) + " promotion=" +
         number(promotion) + " fill=" + number(fill));
    return OK;
}

// ---- memory ----

Result cuMemAllocAsync(Address* address, size_t bytes, Stream* stream) {
    TRY("cuMemAllocAsync");
    if (bytes == 0) return INVALID_VALUE;
    // An allocation is no part of a captured step.
    if (stream && stream->capturing) stream->capturing->broken = true;
    if (keeps_order()) note("cuMemAllocAsync " + number(bytes) + " stream=" + name_of(stream));
    void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(memory, 0xff, bytes);
    *address = reinterpret_cast<Address>(memory);
    return OK;
}
Result cuMemFreeAsync(Address address, Stream* stream) {
    if (keeps_order()) note("cuMemFreeAsync " + number(address) + " stream=" + name_of(stream));
    free(reinterpret_cast<void*>(address));
    return OK;
}
Result cuMemsetD8Async(Address address, unsigned char value, size_t bytes, Stream* stream) {
    TRY("cuMemsetD8Async");
    memset(reinterpret_cast<void*>(address), value, bytes);
    return enqueue(stream, "cuMemsetD8Async " + number(bytes));
}
// A copy of memory that is not pinned waits in the driver for what is queued before it: where that is stuck, it would not come back.
static bool hangs(const void* host, const Stream* stream);

Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
    if (hangs(from, stream)) return NOT_READY;
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    return OK;
}
// Nothing is moved: pinned memory lies elsewhere than its address says.
Result cuMemcpyAsync(Address to, Address from, size_t bytes, Stream* stream) {
    TRY("cuMemcpyAsync");
    return enqueue(stream, "cuMemcpyAsync to=" + number(to) + " from=" + number(from) + " bytes=" + number(bytes)
                               + " stream=" + name_of(stream));
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
    if (hangs(to, stream)) return NOT_READY;
    memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return enqueue(stream, "cuMemcpyDtoHAsync " + number(bytes) + on(stream));
}

Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
    TRY("cuMemcpyDtoDAsync");
    if (bytes == 0) return INVALID_VALUE;
    memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return enqueue(stream, "cuMemcpyDtoDAsync " + number(bytes) + on(stream));
}

// ---- pinned memory: the device sees it 2^40 further up ----

static const Address SHIFT = Address(1) << 40;
static std::map<const char*, size_t> pinned;  // where it begins, and its bytes

static bool hangs(const void* host, const Stream* stream) {
    if (!stuck && !(stream && stream->stuck)) return false;
    std::lock_guard<std::mutex> lock(mutex);
    const char* place = static_cast<const char*>(host);
    auto after = pinned.upper_bound(place);
    return after == pinned.begin() || place >= std::prev(after)->first + std::prev(after)->second;
}

Result cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
    TRY("cuMemHostAlloc");
    if (!current || bytes == 0) return INVALID_VALUE;
    *memory = malloc(bytes);
    memset(*memory, 0xff, bytes);
    {
        std::lock_guard<std::mutex> lock(mutex);
        pinned[static_cast<const char*>(*memory)] = bytes;
    }
    note("cuMemHostAlloc " + number(bytes) + " flags=" + number(flags));
    return OK;
}
Result cuMemFreeHost(void* memory) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        pinned.erase(static_cast<const char*>(memory));
    }
    free(memory);
    note("cuMemFreeHost");
    return OK;
}
Result cuMemHostGetDevicePointer_v2(Address* device, void* host, unsigned flags) {
    TRY("cuMemHostGetDevicePointer");
    if (flags) return INVALID_VALUE;
    *device = reinterpret_cast<Address>(host) + SHIFT;
    return OK;
}
Result cuMemHostRegister_v2(void*, size_t bytes, unsigned flags) {
    TRY("cuMemHostRegister");
    note("cuMemHostRegister " + number(bytes) + " flags=" + number(flags));
    return OK;
}
Result cuMemHostUnregister(void*) {
    note("cuMemHostUnregister");
    return OK;
}

// ---- streams and events ----

Result cuStreamCreate(Stream** stream, unsigned) {
    if (!current) return INVALID_CONTEXT;
    *stream = new Stream{current, nullptr, next_id(), {}, false};
    return OK;
}
Result cuStreamDestroy_v2(Stream* stream) {
    delete stream;
    return OK;
}
Result cuStreamSynchronize(Stream* stream) {
    TRY("cuStreamSynchronize");
    note("cuStreamSynchronize");
    return stuck || (stream && stream->stuck) ? NOT_READY : OK;
}
Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    TRY("cuStreamWaitEvent");
    if (stream && event->stuck) stream->stuck = true;
    if (!keeps_order()) return OK;
    note("cuStreamWaitEvent event=" + number(event->id) + " stream=" + name_of(stream));
    Graph* graph = event->graph;
    if (!graph) return stream && stream->capturing ? CAPTURE_ISOLATION : OK;
    if (!stream) return CAPTURE_IMPLICIT;
    if (stream->capturing && stream->capturing != graph) return CAPTURE_MERGE;
    if (!stream->capturing) {
        stream->capturing = graph;
        graph->before.push_back(event->last);
        stream->last = {graph->nodes.size()};
        graph->nodes.push_back("");
        graph->streams.push_back(stream);
        return OK;
    }
    stream->last.insert(event->last.begin(), event->last.end());
    return OK;
}
Result cuEventCreate(Event** event, unsigned flags) {
    TRY("cuEventCreate");
    *event = new Event{current, flags, false, next_id(), nullptr, {}, false};
    note("cuEventCreate flags=" + number(flags));
    return OK;
}
Result cuEventDestroy_v2(Event* event) {
    delete event;
    return OK;
}
Result cuEventRecord(Event* event, Stream* stream) {
    TRY("cuEventRecord");
    IN_CONTEXT(event->context);
    event->recorded = true;
    event->stuck = stream && stream->stuck;
    if (keeps_order()) {
        note("cuEventRecord event=" + number(event->id) + " stream=" + name_of(stream));
        event->graph = stream ? stream->capturing : nullptr;
        event->last = event->graph ? stream->last : std::set<size_t>();
    }
    return OK;
}
Result cuEventQuery(Event* event) {
    TRY("cuEventQuery");
    return event->recorded && (stuck || event->stuck) ? NOT_READY : OK;
}
// A wait that would not come back.
Result cuEventSynchronize(Event* event) {
    TRY("cuEventSynchronize");
    return event->recorded && (stuck || event->stuck) ? NOT_READY : OK;
}
// The name that every driver exports; `_v2` is left out, as drivers of the 12 series leave it out.
Result cuEventElapsedTime(float* milliseconds, Event* start, Event* stop) {
    TRY("cuEventElapsedTime");
    if (start->flags || stop->flags || !start->recorded || !stop->recorded) return INVALID_HANDLE;
    std::lock_guard<std::mutex> lock(mutex);
    *milliseconds = elapsed_times.empty() ? 1.5f : elapsed_times[elapsed_asked++ % elapsed_times.size()];
    return OK;
}

// ---- graphs ----

Result cuStreamBeginCapture_v2(Stream* stream, unsigned mode) {
    TRY("cuStreamBeginCapture");
    if (!stream) return CAPTURE_UNSUPPORTED;
    stream->capturing = new Graph{{}, false, {}, {stream}};
    stream->last.clear();
    note("cuStreamBeginCapture mode=" + number(mode));
    return OK;
}
Result cuStreamEndCapture(Stream* stream, Graph** graph) {
    TRY("cuStreamEndCapture");
    note("cuStreamEndCapture");
    *graph = nullptr;
    Graph* recorded = stream->capturing;
    if (!recorded) return INVALID_VALUE;
    for (Stream* part : recorded->streams) part->capturing = nullptr;
    if (recorded->broken) {
        delete recorded;
        return CAPTURE_INVALIDATED;
    }
    // Everything that was captured has to come before the end of the stream that the capture began on.
    std::set<size_t> joined, open = stream->last;
    while (!open.empty()) {
        const size_t node = *open.begin();
        open.erase(open.begin());
        if (!joined.insert(node).second) continue;
        open.insert(recorded->before[node].begin(), recorded->before[node].end());
    }
    if (joined.size() != recorded->nodes.size()) {
        delete recorded;
        return CAPTURE_UNJOINED;
    }
    *graph = recorded;
    return OK;
}
Result cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long flags) {
    TRY("cuGraphInstantiate");
    if (flags) return INVALID_VALUE;
    *executable = new Graph(*graph);
    return OK;
}
Result cuGraphLaunch(Graph* executable, Stream* stream) {
    TRY("cuGraphLaunch");
    for (const std::string& node : executable->nodes) {
        if (node.empty()) continue;
        if (Result result = enqueue(stream, "replayed " + node)) return result;
    }
    return OK;
}
Result cuGraphGetNodes(Graph* graph, void* nodes, size_t* count) {
    if (nodes) return INVALID_VALUE;
    *count = 0;
    for (const std::string& node : graph->nodes) *count += !node.empty();
    return OK;
}
Result cuGraphExecDestroy(Graph* executable) {
    note("cuGraphExecDestroy");
    delete executable;
    return OK;
}
Result cuGraphDestroy(Graph* graph) {
    note("cuGraphDestroy");
    delete graph;
    return OK;
}

}  // extern "C"
