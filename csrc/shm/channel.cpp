// SPDX-License-Identifier: MIT
#include "channel.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace tokenspeed::shm {
namespace {

constexpr uint64_t kWord = 8;

uint64_t padding(uint64_t bytes) { return (kWord - bytes % kWord) % kWord; }

}  // namespace

Channel::Channel(const Members& members, ChannelState* state, std::byte* ring, size_t capacity,
                 int writer, std::vector<int> readers)
    : members_(members),
      state_(state),
      ring_(ring),
      capacity_(capacity),
      writer_(writer),
      readers_(std::move(readers)) {}

void Channel::send(const std::byte* data, uint64_t bytes) {
    std::byte head[kWord];
    std::memcpy(head, &bytes, kWord);
    write(head, kWord, bytes == 0);
    write(data, bytes, true);
}

bool Channel::next(int reader, Clock::time_point deadline, uint64_t* bytes) {
    const uint64_t position = state_->readers[reader].read.load(std::memory_order_relaxed);
    const auto begun = [&] { return state_->written.load() - position >= kWord; };
    if (!members_.wait_until(state_->written_bell, writer_, deadline, begun)) return false;
    std::memcpy(bytes, ring_ + position % capacity_, kWord);
    return true;
}

uint64_t Channel::next(int reader) {
    const uint64_t position = state_->readers[reader].read.load(std::memory_order_relaxed);
    members_.wait(state_->written_bell, writer_,
                  [&] { return state_->written.load() - position >= kWord; });
    uint64_t bytes = 0;
    std::memcpy(&bytes, ring_ + position % capacity_, kWord);
    return bytes;
}

void Channel::receive(int reader, std::byte* data, uint64_t bytes) {
    std::byte head[kWord];
    read(reader, head, kWord);
    read(reader, data, bytes);
    read(reader, head, padding(bytes));
}

// Bytes that no reader needs any more; waits until there are some.
uint64_t Channel::free_space() {
    const uint64_t written = state_->written.load(std::memory_order_relaxed);
    uint64_t least = written;
    for (size_t i = 0; i < readers_.size(); ++i) {
        const auto& read = state_->readers[i].read;
        members_.wait(state_->read_bell, readers_[i],
                      [&] { return written - read.load() < capacity_; });
        least = std::min(least, read.load());
    }
    return capacity_ - (written - least);
}

// Data that is `last` of a message is padded; the bell is for whole messages and full rings.
void Channel::write(const std::byte* data, uint64_t bytes, bool last) {
    const uint64_t total = bytes + (last ? padding(bytes) : 0);
    for (uint64_t done = 0; done < total;) {
        const uint64_t space = free_space();
        const uint64_t written = state_->written.load(std::memory_order_relaxed);
        const uint64_t step = std::min({space, total - done, capacity_ - written % capacity_});
        if (done < bytes) {
            std::memcpy(ring_ + written % capacity_, data + done, std::min(step, bytes - done));
        }
        done += step;
        state_->written.store(written + step);
        if ((done == total && last) || step == space) state_->written_bell.ring();
    }
}

void Channel::read(int reader, std::byte* data, uint64_t bytes) {
    std::atomic<uint64_t>& mine = state_->readers[reader].read;
    for (uint64_t done = 0; done < bytes;) {
        const uint64_t position = mine.load(std::memory_order_relaxed);
        members_.wait(state_->written_bell, writer_,
                      [&] { return state_->written.load() != position; });
        const uint64_t ready = state_->written.load() - position;
        const uint64_t step = std::min({ready, bytes - done, capacity_ - position % capacity_});
        std::memcpy(data + done, ring_ + position % capacity_, step);
        done += step;
        mine.store(position + step);
        state_->read_bell.ring();
    }
}

}  // namespace tokenspeed::shm
