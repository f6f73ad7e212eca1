// The CPU's kernels for processors with AVX2, FMA and F16C.
#define FLORA_ISA avx2
#include "all.h"
