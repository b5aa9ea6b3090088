// SPDX-License-Identifier: MIT
// TS_CHECK: a broken invariant stops the process, with its place. Never used to judge requests.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace tokenspeed {

[[noreturn]] inline void check_failed(const char* file, int line, const char* condition) {
    std::fprintf(stderr, "%s:%d: invariant broken: %s\n", file, line, condition);
    std::abort();
}

}  // namespace tokenspeed

#define TS_CHECK(condition) \
    ((condition) ? void(0) : ::tokenspeed::check_failed(__FILE__, __LINE__, #condition))
