// logging.h - one sentence to TensorRT's logger, whichever TensorRT loaded us; to stderr where there is none.
#pragma once

#include "trt_abi.h"

namespace ecmfq::trt {

// Remembers the finder that TensorRT passes to setLoggerFinder. `finder` may be null. Never throws.
void set_logger_finder(void* finder) noexcept;

// printf-style, cut at 1023 bytes. Never throws, never allocates.
__attribute__((format(printf, 2, 3))) void log_message(Severity severity, const char* format, ...) noexcept;

} // namespace ecmfq::trt
