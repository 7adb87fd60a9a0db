#include "image.h"

#include <link.h>

namespace emulator {

namespace {

int visit(dl_phdr_info* info, size_t, void* context) {
    Image& image = *static_cast<Image*>(context);
    const uintptr_t self = reinterpret_cast<uintptr_t>(&visit);
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) & segment = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
        ours |= segment.p_type == PT_LOAD && self >= begin && self < begin + segment.p_memsz;
    }
    if (!ours) return 0;
    image.base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) & segment = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
        // Constants with addresses in them are written once by the loader and sealed: PT_GNU_RELRO.
        if ((segment.p_type == PT_LOAD && !(segment.p_flags & PF_W)) || segment.p_type == PT_GNU_RELRO)
            image.read_only.push_back({begin, begin + segment.p_memsz});
    }
    return 1;
}

}  // namespace

const Image& Image::get() {
    static const Image image = [] {
        Image found;
        dl_iterate_phdr(visit, &found);
        return found;
    }();
    return image;
}

}  // namespace emulator
