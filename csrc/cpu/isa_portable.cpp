// The CPU's kernels for any processor.
#define FLORA_ISA portable
#include "all.h"
