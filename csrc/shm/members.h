// SPDX-License-Identifier: MIT
// Who shares a segment, and waiting for them that ends when one of them dies. Knows no message.
//
// 1. A member's pid and start time are written before its state becomes kPresent.
// 2. A wait spins for at most kSpin, giving its core away, then sleeps on a Bell. It looks once per
//    kTick whether a member's process is gone, so no wait outlives a member by much more.
// 3. A Bell is rung after what it announces was written. It makes a system call only if somebody
//    sleeps; a sleeper looks again after it has announced itself, so that no ring is lost.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokenspeed::shm {

using Clock = std::chrono::steady_clock;

inline constexpr std::chrono::microseconds kSpin{50};
inline constexpr std::chrono::milliseconds kTick{100};
inline constexpr int kMaxMembers = 64;

// A member died, left while it was waited for, or did not come in time.
class RankDied : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct alignas(64) Bell {
    std::atomic<uint32_t> rings{0};
    std::atomic<uint32_t> sleepers{0};

    void ring();
    // Sleeps unless it has rung since `seen` was read; at most `limit`.
    void sleep(uint32_t seen, std::chrono::nanoseconds limit);
};

enum class Presence : uint32_t { kAbsent, kPresent, kLeft };

struct alignas(64) Member {
    std::atomic<Presence> presence;
    std::atomic<int64_t> pid;
    std::atomic<uint64_t> start_time;
};

// A process's view of the members of a segment.
class Members {
  public:
    // `table`: one Member for each of `ranks`, in the segment. `on_tick` runs once per kTick of a
    // wait, and may throw. REQUIRES: at most kMaxMembers.
    Members(Member* table, std::vector<int> ranks, int self, std::chrono::nanoseconds timeout,
            void (*on_tick)());

    void join();
    void leave();

    int size() const { return static_cast<int>(ranks_.size()); }
    int self() const { return self_; }
    int rank(int member) const { return ranks_[member]; }
    bool present(int member) const;  // it has come, and perhaps left since

    // Throws RankDied if some member's process is gone.
    void check() const;

    // Blocks until ready() holds; `bell` rings when it may have become true, which is up to `whom`.
    // Throws RankDied if a member is gone, `whom` has left, or the time-out is over.
    template <typename Ready>
    void wait(Bell& bell, int whom, Ready&& ready) const {
        if (!wait_until(bell, whom, Clock::now() + timeout_, ready)) late(whom);
    }

    // As above; false if it is not ready at `deadline`.
    template <typename Ready>
    bool wait_until(Bell& bell, int whom, Clock::time_point deadline, Ready&& ready) const {
        if (ready() || spin(ready)) return true;
        for (;;) {
            const uint32_t seen = bell.rings.load();
            bell.sleepers.fetch_add(1);
            const auto left = deadline - Clock::now();
            if (!ready() && left.count() > 0) {
                bell.sleep(seen, std::min<std::chrono::nanoseconds>(left, kTick));
            }
            bell.sleepers.fetch_sub(1);
            if (ready()) return true;
            if (const std::optional<std::string> trouble = tick(whom); trouble && !ready()) {
                throw RankDied(*trouble);
            }
            if (Clock::now() >= deadline) return false;
        }
    }

  private:
    template <typename Ready>
    bool spin(Ready&& ready) const {
        const auto end = Clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; ++i) {
                if (ready()) return true;
                pause();
            }
            yield();
        } while (Clock::now() < end);
        return ready();
    }

    static void pause();
    static void yield();

    // What is wrong with the members, looked up at most once per kTick.
    std::optional<std::string> tick(int whom) const;
    std::optional<std::string> find_dead() const;
    [[noreturn]] void late(int whom) const;

    Member* table_;
    std::vector<int> ranks_;
    int self_;
    std::chrono::nanoseconds timeout_;
    void (*on_tick_)();
    mutable Clock::time_point next_tick_{};
};

// Pid and start time of a process. The second is 0 if it is gone or a zombie.
uint64_t start_time_of(int64_t pid);

}  // namespace tokenspeed::shm
