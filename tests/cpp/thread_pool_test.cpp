// SPDX-License-Identifier: MIT
// The kernels' thread pool under ThreadSanitizer: callers that take turns, sizes that change, jobs
// that follow each other at once or after the workers fell asleep.
#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using tokenspeed::cpu::parallel_for;

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::abort();
}

// Every item exactly once, and what the items wrote is seen by the caller without a lock.
void run_jobs(int num_jobs) {
    for (int job = 0; job < num_jobs; ++job) {
        const int64_t count = 1 + (job * 37) % 500;
        std::vector<int64_t> written(count, -1);
        std::atomic<int64_t> items = 0;
        parallel_for(count, 1 + job % 9, [&](int64_t begin, int64_t end) {
            auto* scratch = static_cast<int64_t*>(tokenspeed::cpu::scratch(0, 64));
            for (int64_t i = begin; i < end; ++i) {
                scratch[0] = i;
                written[i] = scratch[0] + job;
            }
            items += end - begin;
        });
        expect(items == count, "each item runs once");
        for (int64_t i = 0; i < count; ++i) expect(written[i] == i + job, "an item's own value");
        if (job % 200 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

}  // namespace

int main() {
    for (int num_threads : {1, 2, 3, 5, 2}) {
        tokenspeed::cpu::set_num_threads(num_threads);
        expect(tokenspeed::cpu::num_threads() == num_threads, "the pool has the size asked for");
        run_jobs(400);
        std::vector<std::thread> callers;
        for (int i = 0; i < 3; ++i) callers.emplace_back(run_jobs, 200);
        for (std::thread& caller : callers) caller.join();
    }
    std::puts("5000 jobs, each item once");
}
