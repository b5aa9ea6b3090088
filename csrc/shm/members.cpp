// SPDX-License-Identifier: MIT
#include "members.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstring>
#include <utility>

namespace tokenspeed::shm {

void Bell::ring() {
    rings.fetch_add(1);
    if (sleepers.load() != 0) syscall(SYS_futex, &rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Bell::sleep(uint32_t seen, std::chrono::nanoseconds limit) {
    timespec time;
    time.tv_sec = limit.count() / 1'000'000'000;
    time.tv_nsec = limit.count() % 1'000'000'000;
    syscall(SYS_futex, &rings, FUTEX_WAIT, seen, &time, nullptr, 0);
}

Members::Members(Member* table, std::vector<int> ranks, int self, std::chrono::nanoseconds timeout,
                 void (*on_tick)())
    : table_(table), ranks_(std::move(ranks)), self_(self), timeout_(timeout), on_tick_(on_tick) {}

void Members::join() {
    Member& me = table_[self_];
    me.pid.store(getpid());
    me.start_time.store(start_time_of(getpid()));
    me.presence.store(Presence::kPresent);
}

void Members::leave() { table_[self_].presence.store(Presence::kLeft); }

bool Members::present(int member) const {
    return table_[member].presence.load() != Presence::kAbsent;
}

void Members::check() const {
    if (const std::optional<std::string> dead = find_dead()) throw RankDied(*dead);
}

std::optional<std::string> Members::tick(int whom) const {
    const auto now = Clock::now();
    if (now < next_tick_) return std::nullopt;
    next_tick_ = now + kTick;
    if (on_tick_ != nullptr) on_tick_();
    if (table_[whom].presence.load() == Presence::kLeft)
        return "rank " + std::to_string(rank(whom)) + " has left";
    return find_dead();
}

std::optional<std::string> Members::find_dead() const {
    for (int i = 0; i < size(); ++i) {
        const Member& member = table_[i];
        if (i == self_ || member.presence.load() != Presence::kPresent) continue;
        const int64_t pid = member.pid.load();
        if (start_time_of(pid) != member.start_time.load()) {
            // It may have left in good order since.
            if (member.presence.load() != Presence::kPresent) continue;
            return "rank " + std::to_string(rank(i)) + " died (process " + std::to_string(pid) +
                   ")";
        }
    }
    return std::nullopt;
}

void Members::late(int whom) const {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout_).count();
    throw RankDied("rank " + std::to_string(rank(whom)) + " does not answer since " +
                   std::to_string(seconds) + " s");
}

void Members::pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void Members::yield() { sched_yield(); }

uint64_t start_time_of(int64_t pid) {
    char path[64], text[1024];
    std::snprintf(path, sizeof(path), "/proc/%lld/stat", static_cast<long long>(pid));
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    const ssize_t length = read(file, text, sizeof(text) - 1);
    close(file);
    if (length <= 0) return 0;
    text[length] = '\0';
    // proc_pid_stat(5): the name may hold blanks and brackets; after it the state, and as the
    // twentieth word from there the start time.
    const char* const name_end = std::strrchr(text, ')');
    char state = 'X';
    unsigned long long start = 0;
    if (name_end == nullptr ||
        std::sscanf(name_end + 1,
                    " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
                    "%llu",
                    &state, &start) != 2)
        return 0;
    return state == 'Z' || state == 'X' ? 0 : start;
}

}  // namespace tokenspeed::shm
