// The kernels, compiled once for each instruction set (ECMFQ_HOST_ISA and the compiler's -m options). Sums have one order, so a set gives
// the same bits whoever calls it and however work is shared out.
#include "host_kernels.h"
#include "layouts.h"
#include "scales.h"
#include "walk.h"

#ifndef ECMFQ_HOST_ISA
#error "compile with -DECMFQ_HOST_ISA=<name>"
#endif

#define ECMFQ_HOST_JOIN2(a, b) a##b
#define ECMFQ_HOST_JOIN(a, b) ECMFQ_HOST_JOIN2(a, b)
#define ECMFQ_HOST_TEXT2(a) #a
#define ECMFQ_HOST_TEXT(a) ECMFQ_HOST_TEXT2(a)

extern const EcmfqHostKernels ECMFQ_HOST_JOIN(ecmfq_host_, ECMFQ_HOST_ISA);
const EcmfqHostKernels ECMFQ_HOST_JOIN(ecmfq_host_, ECMFQ_HOST_ISA) = {
    ECMFQ_HOST_TEXT(ECMFQ_HOST_ISA), search_steps, to_columns, to_rows, blend_in_order, factor, missed_by_nearest, walk};
