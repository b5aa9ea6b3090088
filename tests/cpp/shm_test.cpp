// SPDX-License-Identifier: MIT
// Shared memory under ThreadSanitizer: ranks are threads over one piece of memory, and every result
// is compared with what a plain loop computes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "group.h"
#include "sum.h"

namespace {

using namespace tokenspeed::shm;
using Bytes = std::vector<std::byte>;

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::abort();
}

constexpr std::chrono::seconds kTimeout{60};

// 64-byte aligned zeros.
std::shared_ptr<std::byte> zeros(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    auto* const memory = static_cast<std::byte*>(std::aligned_alloc(64, bytes));
    std::memset(memory, 0, bytes);
    return {memory, [](std::byte* p) { std::free(p); }};
}

template <typename T>
std::byte* bytes_of(std::vector<T>& values) {
    return reinterpret_cast<std::byte*>(values.data());
}

void in_threads(int count, const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
    for (std::thread& thread : threads) thread.join();
}

int32_t value(int rank, int64_t i, int turn) {
    return static_cast<int32_t>((i * (rank + 3) + turn) % 1001 - 500);
}

std::vector<int32_t> values(int rank, int64_t count, int turn) {
    std::vector<int32_t> made(count);
    for (int64_t i = 0; i < count; ++i) made[i] = value(rank, i, turn);
    return made;
}

void check_all_reduce(Group& group, int64_t count, int turn) {
    std::vector<int32_t> x = values(group.index(), count, turn);
    group.all_reduce(DType::kInt32, count, bytes_of(x));
    for (int64_t i = 0; i < count; ++i) {
        int32_t total = 0;
        for (int r = 0; r < group.size(); ++r) total += value(r, i, turn);
        expect(x[i] == total, "all_reduce: the sum of all ranks");
    }
}

// Ragged pieces of [outer, size of rank r, inner].
Pieces ragged(int size, int64_t outer, int64_t inner, int turn) {
    Pieces pieces{outer, {}, inner * 4};
    for (int r = 0; r < size; ++r) pieces.sizes.push_back((r * 2 + turn) % 4);
    return pieces;
}

void check_gather_and_scatter(Group& group, int64_t outer, int64_t inner, int turn) {
    const Pieces pieces = ragged(group.size(), outer, inner, turn);
    const int64_t total = pieces.total(), mine = pieces.sizes[group.index()];
    std::vector<int32_t> piece = values(group.index(), outer * mine * inner, turn);
    std::vector<int32_t> whole(outer * total * inner);
    group.all_gather(pieces, bytes_of(piece), bytes_of(whole));
    for (int64_t o = 0; o < outer; ++o) {
        for (int r = 0; r < group.size(); ++r) {
            const int64_t length = pieces.sizes[r] * inner;
            for (int64_t i = 0; i < length; ++i) {
                const int64_t at = o * total * inner + pieces.offset(r) * inner + i;
                expect(whole[at] == value(r, o * length + i, turn), "all_gather: each one's piece");
            }
        }
    }
    std::vector<int32_t> x = values(group.index(), outer * total * inner, turn);
    group.reduce_scatter(DType::kInt32, pieces, bytes_of(x), bytes_of(piece));
    for (int64_t o = 0; o < outer; ++o) {
        for (int64_t i = 0; i < mine * inner; ++i) {
            const int64_t at = o * total * inner + pieces.offset(group.index()) * inner + i;
            int32_t sum = 0;
            for (int r = 0; r < group.size(); ++r) sum += value(r, at, turn);
            expect(piece[o * mine * inner + i] == sum, "reduce_scatter: the own piece of the sum");
        }
    }
}

void check_exchange(Group& group, int64_t scale, int turn) {
    const auto words = [&](int from, int to) { return scale * ((from + 2 * to + turn) % 3); };
    std::vector<int64_t> send, receive;
    std::vector<int32_t> x, out;
    for (int r = 0; r < group.size(); ++r) {
        send.push_back(words(group.index(), r) * 4);
        receive.push_back(words(r, group.index()) * 4);
        for (int64_t i = 0; i < words(group.index(), r); ++i)
            x.push_back(value(group.index() * 10 + r, i, turn));
        out.resize(out.size() + words(r, group.index()));
    }
    group.all_to_all(send, bytes_of(x), receive, bytes_of(out));
    size_t at = 0;
    for (int r = 0; r < group.size(); ++r) {
        for (int64_t i = 0; i < words(r, group.index()); ++i)
            expect(out[at++] == value(r * 10 + group.index(), i, turn), "all_to_all: its rows");
    }
}

void check_peers(Group& group, int64_t count, int turn) {
    const int root = turn % group.size(), next = (root + 1) % group.size();
    std::vector<int32_t> x = values(group.index(), count, turn);
    group.broadcast(count * 4, root, bytes_of(x));
    expect(x == values(root, count, turn), "broadcast: the root's values");
    if (root == next) return;
    if (group.index() == root) group.send(count * 4, next, bytes_of(x));
    if (group.index() != next) return;
    std::vector<int32_t> y(count);
    group.receive(count * 4, root, bytes_of(y));
    expect(x == y, "receive: what was sent");
}

void check_group(int size) {
    const auto memory = zeros(Group::segment_bytes(size));
    const std::vector<int> names{0, 1, 2, 3};
    in_threads(size, [&](int index) {
        Group group(memory.get(), {names.begin(), names.begin() + size}, index, kTimeout);
        for (int turn = 0; turn < 120; ++turn) {
            const int64_t large = turn % 20 == 0 ? 90'000 : 0;  // more than one round
            check_all_reduce(group, 1 + turn * 13 % 400 + large, turn);
            check_gather_and_scatter(group, 1 + turn % 3, 5 + large / 2, turn);
            check_exchange(group, 7 + large, turn);
            check_peers(group, 11 + large, turn);
            if (turn % 40 == index) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
    });
}

// One writer, readers of different speed, messages from nothing to three times the ring.
void check_channel(int num_readers) {
    constexpr size_t kCapacity = 1024;
    const auto memory = zeros(sizeof(Member) * kMaxMembers + sizeof(ChannelState) + kCapacity);
    auto* const table = reinterpret_cast<Member*>(memory.get());
    std::byte* const state = memory.get() + sizeof(Member) * kMaxMembers;
    std::vector<int> all, readers;
    for (int i = 0; i <= num_readers; ++i) all.push_back(i);
    for (int i = 1; i <= num_readers; ++i) readers.push_back(i);
    const auto length = [](int turn) { return turn % 10 == 0 ? turn % 3073 : turn * 7 % 300; };
    in_threads(num_readers + 1, [&](int index) {
        Members members(table, all, index, kTimeout, nullptr);
        members.join();
        Channel channel(members, reinterpret_cast<ChannelState*>(state),
                        state + sizeof(ChannelState), kCapacity, 0, readers);
        for (int turn = 0; turn < 4000; ++turn) {
            Bytes expected(length(turn));
            for (size_t i = 0; i < expected.size(); ++i) expected[i] = std::byte(i * 7 + turn);
            if (index == 0) {
                channel.send(expected.data(), expected.size());
                if (turn % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                continue;
            }
            Bytes got(channel.next(index - 1));
            channel.receive(index - 1, got.data(), got.size());
            expect(got == expected, "a reader gets every message as it was sent");
            if (turn % 700 == index) std::this_thread::sleep_for(std::chrono::milliseconds(3));
        }
        members.leave();
    });
}

void check_end() {
    const auto memory = zeros(Group::segment_bytes(2));
    in_threads(2, [&](int index) {
        Group group(memory.get(), {4, 7}, index, kTimeout);
        check_all_reduce(group, 10, 0);
        if (index == 1) return group.leave();
        std::vector<int32_t> x(3);
        try {
            group.receive(12, 1, bytes_of(x));
            expect(false, "a wait for who has left must end");
        } catch (const RankDied& died) {
            expect(std::string(died.what()) == "rank 7 has left", "the message names the rank");
        }
    });
}

}  // namespace

int main() {
    for (int size = 1; size <= 4; ++size) check_group(size);
    for (int num_readers = 1; num_readers <= 3; ++num_readers) check_channel(num_readers);
    check_end();
    std::puts("groups of 1 to 4 ranks, rings of 1 to 3 readers");
}
