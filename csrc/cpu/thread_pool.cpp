// SPDX-License-Identifier: MIT
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace tokenspeed::cpu {
namespace {

constexpr int kSpins = 4000;               // some tens of microseconds
constexpr uint32_t kClosed = 0xFFFFFFFFu;  // an index that no job reaches

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// `ticket_` is (epoch << 32 | next item). A chunk is claimed by a compare-and-swap on the whole
// word, so a claim succeeds only while the job it was read for is open: run() closes the word under
// a new epoch before it writes the next job's fields. The fields are released and acquired: who has
// read one of the next job's also sees the word closed, and its claim fails.
class Pool {
  public:
    explicit Pool(int threads) {
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
        } catch (...) {  // no more threads to be had
            end();
            throw;
        }
    }

    ~Pool() { end(); }

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void run(int64_t count, int64_t chunk, void (*body)(void*, int64_t, int64_t), void* context) {
        const std::lock_guard<std::mutex> turn(turn_);
        const uint64_t epoch = static_cast<uint64_t>(epoch_.load(std::memory_order_relaxed)) + 1;
        ticket_.store(epoch << 32 | kClosed);
        count_.store(count, std::memory_order_release);
        chunk_.store(chunk, std::memory_order_release);
        body_.store(body, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        done_.store(0, std::memory_order_relaxed);
        ticket_.store(epoch << 32);
        epoch_.store(static_cast<uint32_t>(epoch));
        epoch_.notify_all();
        help();
        for (int spin = 0; done_.load(std::memory_order_acquire) != count; ++spin) {
            if (spin < kSpins) {
                pause();
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    void end() {
        stop_.store(true);
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    // Runs chunks of the open job until none is left.
    void help() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const int64_t begin = static_cast<uint32_t>(ticket);
            const int64_t count = count_.load(std::memory_order_acquire);
            const int64_t chunk = chunk_.load(std::memory_order_acquire);
            const auto body = body_.load(std::memory_order_acquire);
            void* const context = context_.load(std::memory_order_acquire);
            if (static_cast<uint32_t>(ticket) == kClosed || begin >= count) return;
            const int64_t end = std::min(begin + chunk, count);
            const uint64_t next = (ticket >> 32) << 32 | static_cast<uint64_t>(end);
            if (!ticket_.compare_exchange_strong(ticket, next)) continue;
            body(context, begin, end);
            done_.fetch_add(end - begin, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void work() {
        uint32_t seen = epoch_.load();
        while (!stop_.load()) {
            help();
            for (int spin = 0; spin < kSpins && epoch_.load() == seen; ++spin) pause();
            epoch_.wait(seen);
            seen = epoch_.load();
        }
    }

    std::mutex turn_;
    std::vector<std::thread> workers_;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint64_t> ticket_{kClosed};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int64_t> count_{0};
    std::atomic<int64_t> chunk_{1};
    std::atomic<void (*)(void*, int64_t, int64_t)> body_{nullptr};
    std::atomic<void*> context_{nullptr};
};

std::mutex pool_mutex;
std::atomic<Pool*> pool{nullptr};

// Never destroyed at exit: a worker may be blocked, and the process ends anyway.
Pool& the_pool() {
    if (Pool* started = pool.load(std::memory_order_acquire)) return *started;
    const std::lock_guard<std::mutex> lock(pool_mutex);
    if (pool.load() == nullptr) pool.store(new Pool(physical_cores()));
    return *pool.load();
}

}  // namespace

void parallel_range(int64_t count, int64_t chunk, void (*body)(void*, int64_t, int64_t),
                    void* context) {
    Pool& workers = the_pool();
    if (workers.size() == 1) {
        body(context, 0, count);
    } else {
        workers.run(count, chunk, body, context);
    }
}

void* scratch(int slot, size_t bytes) {
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    struct Area {
        std::unique_ptr<void, Free> memory;
        size_t bytes = 0;
    };
    thread_local Area areas[4];
    Area& area = areas[slot];
    if (area.bytes < bytes) {
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        area.memory.reset();
        area.memory.reset(std::aligned_alloc(64, rounded));
        area.bytes = area.memory ? rounded : 0;
        if (!area.memory) throw std::bad_alloc();
    }
    return area.memory.get();
}

int physical_cores() {
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        std::set<std::string> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            std::string core = std::to_string(cpu);
            const std::string path =
                "/sys/devices/system/cpu/cpu" + core + "/topology/thread_siblings_list";
            if (std::FILE* file = std::fopen(path.c_str(), "r")) {
                char line[256];
                if (std::fgets(line, sizeof(line), file)) core = line;
                std::fclose(file);
            }
            cores.insert(core);
        }
        if (!cores.empty()) return static_cast<int>(cores.size());
    }
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int num_threads() { return the_pool().size(); }

void set_num_threads(int count) {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    Pool* const old = pool.exchange(new Pool(count));
    delete old;
}

}  // namespace tokenspeed::cpu
