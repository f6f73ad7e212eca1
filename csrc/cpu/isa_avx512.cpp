// The CPU's kernels for processors with AVX-512 (F, BW, DQ, VL).
#define FLORA_ISA avx512
#include "all.h"
