// A driver library that can be broken in every way that the probe tells apart.
#include <cstring>

#ifndef VERSION
#define VERSION 13000
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef COUNT_RESULT
#define COUNT_RESULT 0
#endif
#ifndef COUNT
#define COUNT 2
#endif
#ifndef MAJOR
#define MAJOR 9
#endif

extern "C" {
#ifndef NO_SYMBOLS
unsigned cuInit(unsigned) { return INIT; }
unsigned cuDriverGetVersion(int* version) {
    *version = VERSION;
    return 0;
}
unsigned cuDeviceGetCount(int* count) {
    *count = COUNT;
    return COUNT_RESULT;
}
unsigned cuDeviceGet(int* device, int ordinal) {
    *device = 100 + ordinal;
    return 0;
}
unsigned cuDeviceGetName(char* name, int size, int device) {
    strncpy(name, device == 100 ? "First" : "Second", static_cast<size_t>(size));
    return 0;
}
#ifndef NO_ATTRIBUTES
unsigned cuDeviceGetAttribute(int* value, int attribute, int device) {
    // The second device is always an sm_75.
    const bool first = device == 100;
    switch (attribute) {
        case 16: *value = first ? 132 : 46; return 0;
        case 75: *value = first ? MAJOR : 7; return 0;
        case 76: *value = first ? 0 : 5; return 0;
        case 97: *value = first ? 232448 : 65536; return 0;
        default: return 1;
    }
}
#endif
#endif
}
