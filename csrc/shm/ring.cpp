// SPDX-License-Identifier: MIT
#include "ring.h"

#include <numeric>
#include <thread>
#include <utility>

namespace tokenspeed::shm {
namespace {

constexpr size_t kTable = sizeof(Member) * kMaxMembers;

std::vector<int> numbers(int first, int count) {
    std::vector<int> all(count);
    std::iota(all.begin(), all.end(), first);
    return all;
}

size_t check_size(int num_readers, size_t capacity) {
    if (num_readers < 1 || num_readers >= kMaxMembers || capacity < 16 || capacity % 8 != 0)
        throw std::invalid_argument("a ring needs 1 to 63 readers and a capacity divisible by 8");
    return kTable + sizeof(ChannelState) + capacity;
}

}  // namespace

Ring::Ring(Segment segment, int num_readers, int self, size_t capacity,
           std::chrono::nanoseconds timeout, void (*on_tick)())
    : segment_(std::move(segment)),
      num_readers_(num_readers),
      members_(reinterpret_cast<Member*>(segment_.data()), numbers(0, num_readers + 1), self,
               timeout, on_tick),
      channel_(members_, reinterpret_cast<ChannelState*>(segment_.data() + kTable),
               segment_.data() + kTable + sizeof(ChannelState), capacity, 0,
               numbers(1, num_readers)) {
    members_.join();
}

std::unique_ptr<Ring> Ring::write(const std::string& name, int num_readers, size_t capacity,
                                  std::chrono::nanoseconds timeout, void (*on_tick)()) {
    const size_t bytes = check_size(num_readers, capacity);
    return std::unique_ptr<Ring>(
        new Ring(Segment::create(name, bytes), num_readers, 0, capacity, timeout, on_tick));
}

std::unique_ptr<Ring> Ring::read(const std::string& name, int num_readers, int reader,
                                 size_t capacity, std::chrono::nanoseconds timeout,
                                 void (*on_tick)()) {
    const size_t bytes = check_size(num_readers, capacity);
    if (reader < 0 || reader >= num_readers)
        throw std::invalid_argument("reader " + std::to_string(reader) + " of " +
                                    std::to_string(num_readers));
    const auto deadline = Clock::now() + timeout;
    Segment segment;
    for (int i = 1; !segment.open(name, bytes); ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (Clock::now() > deadline) throw RankDied("no rank made shared memory " + name);
        if (on_tick != nullptr && i % 100 == 0) on_tick();
    }
    return std::unique_ptr<Ring>(
        new Ring(std::move(segment), num_readers, 1 + reader, capacity, timeout, on_tick));
}

Ring::~Ring() {
    members_.leave();
    if (members_.self() == 0) segment_.unlink();
}

void Ring::connect() {
    Bell unused;
    for (int i = 1; i <= num_readers_; ++i) {
        members_.wait(unused, i, [&] { return members_.present(i); });
    }
    segment_.unlink();
}

void Ring::send(const std::byte* data, uint64_t bytes) { channel_.send(data, bytes); }

bool Ring::next(Clock::time_point deadline, uint64_t* bytes) {
    return channel_.next(members_.self() - 1, deadline, bytes);
}

void Ring::receive(std::byte* data, uint64_t bytes) {
    channel_.receive(members_.self() - 1, data, bytes);
}

}  // namespace tokenspeed::shm
