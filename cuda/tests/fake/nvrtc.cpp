// A stand-in for NVRTC: its "cubin" is a text that names what was compiled, and it counts the compiles.
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

static std::atomic<unsigned> compiles;

struct Program {
    std::string source, name, headers, cubin, log;
};

static int copy(const std::string& text, char* out) {
    memcpy(out, text.c_str(), text.size() + 1);
    return 0;
}

extern "C" {
unsigned fake_nvrtc_compiles() { return compiles; }

int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
    *count = 4;
    return 0;
}
int nvrtcGetSupportedArchs(int* archs) {
    const int known[] = {80, 89, 90, 120};
    memcpy(archs, known, sizeof known);
    return 0;
}
int nvrtcCreateProgram(Program** program, const char* source, const char* name, int headers, const char* const*,
                       const char* const* header_names) {
    *program = new Program{source, name, "", "", ""};
    for (int i = 0; i < headers; ++i) (*program)->headers += std::string(" ") + header_names[i];
    return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    ++compiles;
    // Long enough for a second thread to start the same compile, if it is let.
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    program->cubin = program->name;
    for (int i = 0; i < count; ++i) program->cubin += std::string(" ") + options[i];
    if (program->source.find("#error") != std::string::npos) {
        program->log = program->name + "(1): error: #error directive";
        return 6;
    }
    if (program->source.find("INTERNAL") != std::string::npos) {
        program->log = "out of sorts";
        return 11;
    }
    return 0;
}
int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return 0;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) { return copy(program->log, log); }
int nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->cubin.size() + 1;
    return 0;
}
int nvrtcGetCUBIN(Program* program, char* cubin) { return copy(program->cubin, cubin); }
int nvrtcGetPTXSize(Program* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
int nvrtcGetPTX(Program* program, char* ptx) { return copy(program->cubin, ptx); }
}
