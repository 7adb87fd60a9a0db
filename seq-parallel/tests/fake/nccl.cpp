// A stand-in for NCCL among the threads of one process: device memory is host memory, sends and receives meet as soon as both are in, and
// every call of interest is written to a log that the test reads. Calls can be told to fail or to hang, communicators to break.
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

enum Result { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

struct UniqueId {
    char bytes[128];
};

// As in nccl.h since 2.26.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char* net_name;
    int split_share, traffic_class;
};

struct World;
struct Communicator {
    World* world;
    int rank;
    int state;
    bool finalized;
    // Messages that wait for the other rank: of which pair, and the how manieth. Events cannot wait here, so the launch does.
    std::set<std::pair<std::pair<int, int>, int>> connecting;
};
struct Half {
    char* memory;
    size_t bytes;
};
struct World {
    int ranks;
    int present, finalized;
    // Of each pair of ranks, in order.
    std::map<std::pair<int, int>, std::deque<Half>> sends, receives;
    // How many messages of a pair the sender, and the receiver, has posted.
    std::map<std::pair<int, int>, int> sent, received;
};

static std::mutex mutex;
static std::string log_text, taken_text;
static std::map<std::string, int> failures;
static std::set<std::string> hung;
static std::map<std::string, World*> worlds;
static std::vector<Communicator*> communicators;
// How often a rank was told how its communicators fare.
static std::map<int, int> asked;
static int ids, version_number = 22809;

struct Call {
    bool is_send;
    char* memory;
    size_t bytes;
    int peer;
    Communicator* comm;
};
static thread_local int depth;
static thread_local std::vector<Call> group;

static void note(const std::string& line) { log_text += line + "\n"; }
static std::string number(long value) { return std::to_string(value); }

static int outcome(const char* call) {
    auto found = failures.find(call);
    return found == failures.end() ? SUCCESS : found->second;
}

// Whether the other rank of every message that a communicator has posted has posted it too.
static bool connected(Communicator* comm) {
    for (auto message = comm->connecting.begin(); message != comm->connecting.end();) {
        bool both = comm->world->sent[message->first] >= message->second && comm->world->received[message->first] >= message->second;
        message = both ? comm->connecting.erase(message) : std::next(message);
    }
    return comm->connecting.empty();
}

// Ending takes every rank, and says so afterwards only.
static bool ended(Communicator* comm) {
    return comm->finalized && comm->world->finalized == comm->world->ranks && !hung.count("ncclCommFinalize");
}

static void meet(World* world, std::pair<int, int> pair) {
    auto &sends = world->sends[pair], &receives = world->receives[pair];
    while (!sends.empty() && !receives.empty()) {
        Half from = sends.front(), to = receives.front();
        sends.pop_front();
        receives.pop_front();
        memcpy(to.memory, from.memory, from.bytes < to.bytes ? from.bytes : to.bytes);
    }
}

extern "C" {

// ---- for the test ----

const char* fake_nccl_take_log() {
    std::lock_guard<std::mutex> lock(mutex);
    taken_text = log_text;
    log_text.clear();
    return taken_text.c_str();
}
void fake_nccl_fail(const char* call, int code) {
    std::lock_guard<std::mutex> lock(mutex);
    if (code)
        failures[call] = code;
    else
        failures.erase(call);
}
void fake_nccl_hang(const char* call, int value) {
    std::lock_guard<std::mutex> lock(mutex);
    if (value)
        hung.insert(call);
    else
        hung.erase(call);
}
// Breaks the communicators of a rank as the network would: they say so when they are asked.
void fake_nccl_break(int rank, int code) {
    std::lock_guard<std::mutex> lock(mutex);
    for (Communicator* comm : communicators)
        if (comm->rank == rank) comm->state = code;
}
int fake_nccl_asked(int rank) {
    std::lock_guard<std::mutex> lock(mutex);
    return asked[rank];
}
void fake_nccl_version(int version) {
    std::lock_guard<std::mutex> lock(mutex);
    version_number = version;
}
int fake_nccl_alive() {
    std::lock_guard<std::mutex> lock(mutex);
    return static_cast<int>(communicators.size());
}

// ---- NCCL ----

int ncclGetVersion(int* version) {
    std::lock_guard<std::mutex> lock(mutex);
    *version = version_number;
    return SUCCESS;
}
const char* ncclGetErrorString(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}
int ncclGetUniqueId(UniqueId* id) {
    std::lock_guard<std::mutex> lock(mutex);
    if (int code = outcome("ncclGetUniqueId")) return code;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "stand-in %d", ++ids);
    return SUCCESS;
}
int ncclCommInitRankConfig(Communicator** comm, int ranks, UniqueId id, int rank, Config* config) {
    std::lock_guard<std::mutex> lock(mutex);
    if (int code = outcome("ncclCommInitRankConfig")) return code;
    if (config->size != sizeof(Config) || config->magic != 0xcafebeef || config->version < 21400) return INVALID_ARGUMENT;
    // What nobody has set is not to be read as a class.
    if (config->split_share != INT_MIN || config->traffic_class != INT_MIN) return INVALID_ARGUMENT;
    World*& world = worlds[id.bytes];
    if (!world) world = new World{ranks, 0, 0, {}, {}, {}, {}};
    if (rank < 0 || rank >= ranks || world->ranks != ranks) return INVALID_ARGUMENT;
    ++world->present;
    // Done when all are here, as the nonblocking call says.
    *comm = new Communicator{world, rank, IN_PROGRESS, false, {}};
    communicators.push_back(*comm);
    note("ncclCommInitRankConfig rank=" + number(rank) + " of " + number(ranks) + " blocking=" + number(config->blocking));
    return config->blocking ? INVALID_USAGE : IN_PROGRESS;
}
int ncclCommGetAsyncError(Communicator* comm, int* state) {
    std::lock_guard<std::mutex> lock(mutex);
    ++asked[comm->rank];
    if (comm->state == IN_PROGRESS && comm->world->present == comm->world->ranks && !hung.count("ncclCommInitRankConfig"))
        comm->state = SUCCESS;
    bool busy = !connected(comm) || (comm->finalized && !ended(comm));
    *state = comm->state == SUCCESS && busy ? IN_PROGRESS : comm->state;
    return SUCCESS;
}
int ncclGroupStart() {
    ++depth;
    return SUCCESS;
}
static int call(bool is_send, char* memory, size_t bytes, int type, int peer, Communicator* comm) {
    const char* name = is_send ? "ncclSend" : "ncclRecv";
    std::lock_guard<std::mutex> lock(mutex);
    if (int code = outcome(name)) return code;
    // Alone, a send and a receive of two ranks can wait for each other for ever.
    if (depth != 1 || type != 1) return INVALID_USAGE;
    if (comm->state != SUCCESS) return comm->state;
    // A communicator cannot be used before it has done what it was asked for last.
    if (!connected(comm)) return INVALID_ARGUMENT;
    group.push_back({is_send, memory, bytes, peer, comm});
    return SUCCESS;
}
int ncclSend(const void* memory, size_t bytes, int type, int peer, Communicator* comm, void*) {
    return call(true, static_cast<char*>(const_cast<void*>(memory)), bytes, type, peer, comm);
}
int ncclRecv(void* memory, size_t bytes, int type, int peer, Communicator* comm, void*) {
    return call(false, static_cast<char*>(memory), bytes, type, peer, comm);
}
int ncclGroupEnd() {
    std::lock_guard<std::mutex> lock(mutex);
    --depth;
    std::vector<Call> calls;
    calls.swap(group);
    if (int code = outcome("ncclGroupEnd")) return code;
    std::string line = "group";
    for (const Call& c : calls) {
        World* world = c.comm->world;
        std::pair<int, int> pair = c.is_send ? std::make_pair(c.comm->rank, c.peer) : std::make_pair(c.peer, c.comm->rank);
        (c.is_send ? world->sends : world->receives)[pair].push_back({c.memory, c.bytes});
        c.comm->connecting.insert({pair, ++(c.is_send ? world->sent : world->received)[pair]});
        meet(world, pair);
        line += " " + number(pair.first) + (c.is_send ? ">" : "<") + number(pair.second) + ":" + number(static_cast<long>(c.bytes));
    }
    note(line);
    for (const Call& c : calls)
        if (!connected(c.comm)) return IN_PROGRESS;
    return SUCCESS;
}
static int end(const char* name, Communicator* comm) {
    note(std::string(name) + " rank=" + number(comm->rank));
    for (size_t i = 0; i < communicators.size(); ++i)
        if (communicators[i] == comm) communicators.erase(communicators.begin() + static_cast<long>(i));
    // Blocks of an aborted rank are gone; nobody may write to them.
    for (auto& entry : comm->world->sends)
        if (entry.first.first == comm->rank) entry.second.clear();
    for (auto& entry : comm->world->receives)
        if (entry.first.second == comm->rank) entry.second.clear();
    delete comm;
    return SUCCESS;
}
int ncclCommFinalize(Communicator* comm) {
    std::lock_guard<std::mutex> lock(mutex);
    if (int code = outcome("ncclCommFinalize")) return code;
    comm->finalized = true;
    ++comm->world->finalized;
    return IN_PROGRESS;
}
int ncclCommDestroy(Communicator* comm) {
    std::lock_guard<std::mutex> lock(mutex);
    // Before that it would free what is in use.
    if (!ended(comm)) return INVALID_USAGE;
    return end("ncclCommDestroy", comm);
}
int ncclCommAbort(Communicator* comm) {
    for (;;) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (!hung.count("ncclCommAbort")) return end("ncclCommAbort", comm);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
}

}  // extern "C"
