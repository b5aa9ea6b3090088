// SPDX-License-Identifier: MIT
// A page that is being written is its writer's alone.
// expect: share
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
SealedPage read(const WritablePage& page) { return page.share(); }
#else
SealedPage read(const SealedPage& page) { return page.share(); }
#endif
}  // namespace tokenspeed
