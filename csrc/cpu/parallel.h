// How CPU kernels run loops on torch's threads without seeing a torch header; bindings.cpp passes the function.
#pragma once

#include <cstdint>

namespace longattn::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body on disjoint ranges that cover [0, end), each of at least `grain` items where there are that many.
using ParallelFor = void (*)(int64_t end, int64_t grain, RangeBody body, void* context);

}  // namespace longattn::cpu
