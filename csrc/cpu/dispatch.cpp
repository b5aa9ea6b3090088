// SPDX-License-Identifier: MIT
// The widest set of kernels that this CPU runs, found once. Knows no kernel by name.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace tokenspeed::cpu {

#define TS_DECLARE(isa)            \
    namespace isa {                \
    extern const Kernels kKernels; \
    }
#ifdef TS_HAVE_avx2
TS_DECLARE(avx512bf16)
TS_DECLARE(avx512)
TS_DECLARE(avx2)
#endif
#ifdef TS_HAVE_neon
TS_DECLARE(neon)
#endif
TS_DECLARE(portable)

namespace {

struct Builds {
    const Kernels* list[8] = {};
    int size = 0;

    Builds() {
#ifdef TS_HAVE_avx2
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 =
            avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool pairs =
            __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
        if (avx512 && pairs) list[size++] = &avx512bf16::kKernels;
        if (avx512) list[size++] = &avx512::kKernels;
        if (avx2) list[size++] = &avx2::kKernels;
#endif
#ifdef TS_HAVE_neon
        list[size++] = &neon::kKernels;
#endif
        list[size++] = &portable::kKernels;
    }
};

const Builds& builds() {
    static const Builds found;
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* const override = chosen.load(std::memory_order_relaxed);
    return override != nullptr ? *override : *builds().list[0];
}

const Kernels* const* available_kernels() { return builds().list; }

bool set_isa(const char* isa) {
    for (int i = 0; i < builds().size; ++i) {
        if (std::strcmp(builds().list[i]->isa, isa) == 0) {
            chosen.store(builds().list[i]);
            return true;
        }
    }
    return false;
}

}  // namespace tokenspeed::cpu
