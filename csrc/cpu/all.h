// Everything that one instruction set needs; see simd.h for why it is compiled once for each.
#pragma once

#include "adamw.h"
#include "merge.h"
#include "shrink.h"
#include "wgrad.h"

namespace flora {
namespace FLORA_ISA {

extern const Backend backend;
const Backend backend = {
    nullptr, merge_workspace, merge, shrink_workspace, shrink, expand_workspace, expand, wgrad_workspace, wgrad,
    adamw_workspace, adamw,
};

}  // namespace FLORA_ISA
}  // namespace flora
