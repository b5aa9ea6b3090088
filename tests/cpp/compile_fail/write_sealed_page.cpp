// SPDX-License-Identifier: MIT
// A page that others may read takes no more writes: only writable pages join a list as targets.
// expect: SealedPage
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
void write(PageList& pages, SealedPage page) { pages.append(std::move(page)); }
#else
void write(PageList& pages, WritablePage page) { pages.append(std::move(page)); }
#endif
}  // namespace tokenspeed
