# Toolchain file: the library for linux-aarch64 (Jetson, DGX Spark) from a machine of another kind. ecmfq_export/engine/cross_compile.py
# passes it with the two folders; by hand:
#   cmake -S plugins -B build/aarch64 -G Ninja -DCMAKE_TOOLCHAIN_FILE=plugins/aarch64.cmake -DECMFQ_CUDA_ARCHS=87 \
#     -DECMFQ_CUDA_INCLUDE=/usr/local/cuda/include -DECMFQ_CUDA_LIB=FOLDER_OF_AARCH64_libcudart_static.a
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
if(NOT CMAKE_CXX_COMPILER)
  set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
endif()
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
# CMake tests its compilers in projects of their own, which read this file again.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ECMFQ_CUDA_INCLUDE ECMFQ_CUDA_LIB)
# With a foreign host compiler nvcc looks into targets/<platform> of its toolkit alone. Headers are the same for all platforms.
set(CMAKE_CXX_FLAGS_INIT "-isystem ${ECMFQ_CUDA_INCLUDE}")
set(CMAKE_CUDA_FLAGS_INIT "-isystem ${ECMFQ_CUDA_INCLUDE} -L${ECMFQ_CUDA_LIB}")
