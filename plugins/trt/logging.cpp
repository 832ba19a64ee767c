#include "logging.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>

namespace ecmfq::trt {
namespace {

enum class LoggerLayout { kUnknown, kV10, kV11 };

std::atomic<void*> g_finder{nullptr};
std::atomic<LoggerLayout> g_layout{LoggerLayout::kUnknown};

// The finder carries no version that could be asked before its layout is known, so ask the library whose read-only data
// holds its virtual table. getInferLibVersion: 10.3 -> 100300, 11.4 -> 110400, TensorRT-RTX 1.7.1 -> 10701.
LoggerLayout layout_of(void* finder) noexcept {
    const void* vtable = nullptr;
    __builtin_memcpy(&vtable, finder, sizeof vtable);
    Dl_info info{};
    if (dladdr(vtable, &info) == 0 || info.dli_fname == nullptr) return LoggerLayout::kUnknown;
    void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return LoggerLayout::kUnknown;
    void* symbol = dlsym(library, "getInferLibVersion");
    LoggerLayout layout = LoggerLayout::kUnknown;
    if (symbol != nullptr) {
        const int32_t version = reinterpret_cast<int32_t (*)()>(symbol)();
        const bool is_rtx = version >= 10000 && version < 20000; // TensorRT-RTX 1.x
        if (version >= 110000 || (is_rtx && version >= 10700)) layout = LoggerLayout::kV11;
        if (version >= 100000 && version < 110000) layout = LoggerLayout::kV10;
        // Older TensorRT-RTX was not tried: stderr.
    }
    dlclose(library);
    return layout;
}

} // namespace

void set_logger_finder(void* finder) noexcept {
    g_layout.store(finder == nullptr ? LoggerLayout::kUnknown : layout_of(finder));
    g_finder.store(finder);
}

void log_message(Severity severity, const char* format, ...) noexcept {
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);

    void* finder = g_finder.load();
    const LoggerLayout layout = g_layout.load();
    if (finder != nullptr && layout == LoggerLayout::kV11) {
        if (LoggerV11* logger = static_cast<LoggerFinderV11*>(finder)->findLogger()) return logger->log(severity, message);
    }
    if (finder != nullptr && layout == LoggerLayout::kV10) {
        if (LoggerV10* logger = static_cast<LoggerFinderV10*>(finder)->findLogger()) return logger->log(severity, message);
    }
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "[ecmfq] %s\n", message);
}

} // namespace ecmfq::trt
