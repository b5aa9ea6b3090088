// SPDX-License-Identifier: MIT
// A request that never ran has nothing that could end.
// expect: no matching function|could not convert
#include "scheduler/states.h"

namespace tokenspeed {
#ifdef MUST_FAIL
Ended finish(Waiting state) { return on(std::move(state), End{}); }
#else
Ended finish(Decoding state) { return on(std::move(state), End{}); }
#endif
}  // namespace tokenspeed
