// exports.cpp - the two C functions that TensorRT looks up in a plugin library.

#include "logging.h"
#include "routed_moe_plugin.h"

extern "C" {

// All creators of this library; TensorRT registers them. The array lives as long as the library.
__attribute__((visibility("default"))) ecmfq::trt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static ecmfq::trt::RoutedMoeCreator routed_moe;
    static ecmfq::trt::IPluginCreatorInterface* const creators[] = {&routed_moe};
    count = static_cast<int32_t>(sizeof creators / sizeof creators[0]);
    return creators;
}

__attribute__((visibility("default"))) void setLoggerFinder(void* finder) {
    ecmfq::trt::set_logger_finder(finder);
}

} // extern "C"
