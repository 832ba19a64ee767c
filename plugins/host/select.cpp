// Which set of kernels this CPU can run.
#include <cstring>

#include "host_kernels.h"

extern const EcmfqHostKernels ecmfq_host_base;
#if defined(ECMFQ_HOST_X86)
extern const EcmfqHostKernels ecmfq_host_avx2, ecmfq_host_avx512;
#endif

const EcmfqHostKernels* ecmfq_host_kernels(const char* isa) {
  const EcmfqHostKernels* sets[3] = {};
  int count = 0;
#if defined(ECMFQ_HOST_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    sets[count++] = &ecmfq_host_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets[count++] = &ecmfq_host_avx2;
#endif
  sets[count++] = &ecmfq_host_base;
  if (!isa) return sets[0];
  for (int i = 0; i < count; ++i)
    if (std::strcmp(sets[i]->isa, isa) == 0) return sets[i];
  return nullptr;
}

int ecmfq_host_abi_version() { return ECMFQ_HOST_ABI_VERSION; }
