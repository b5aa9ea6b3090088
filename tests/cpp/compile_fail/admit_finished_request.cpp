// SPDX-License-Identifier: MIT
// What is over does not come back.
// expect: no matching function|could not convert
#include "scheduler/states.h"

namespace tokenspeed {
#ifdef MUST_FAIL
Prefilling again(Finished state, Admit admit) { return on(std::move(state), std::move(admit)); }
#else
Prefilling again(Retracted state, Admit admit) { return on(std::move(state), std::move(admit)); }
#endif
}  // namespace tokenspeed
