// SPDX-License-Identifier: MIT
// A stream of messages from one member to some others through a ring of bytes in their segment.
//
// 1. written and read[i] count bytes since the start and never fall; read[i] <= written <=
//    min(read) + capacity. Byte b of the stream lies at b % capacity.
// 2. A message is its length in 8 bytes, then its bytes, padded to 8. It begins at a multiple of 8,
//    so its length does not wrap around, but may become readable in two steps. It may exceed the
//    ring: the writer fills what is free and goes on as the slowest reader makes room.
// 3. Only the writer stores written, only reader i stores read[i]; bytes are stored before written,
//    and loaded before read[i].
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "members.h"

namespace tokenspeed::shm {

struct ChannelState {
    alignas(64) std::atomic<uint64_t> written{0};
    Bell written_bell;
    Bell read_bell;
    struct alignas(64) Reader {
        std::atomic<uint64_t> read{0};
    };
    Reader readers[kMaxMembers];
};

class Channel {
  public:
    // `state` and `ring` lie in the segment, zero when it is made. `readers`: members, in the order
    // of state->readers. REQUIRES: capacity is a multiple of 8, at least 16.
    Channel(const Members& members, ChannelState* state, std::byte* ring, size_t capacity,
            int writer, std::vector<int> readers);

    // Returns when all of it is in the ring; waits while a reader is behind by the ring's size.
    void send(const std::byte* data, uint64_t bytes);

    // The length of the next message; false if none begins until `deadline`. For reader `reader`.
    bool next(int reader, Clock::time_point deadline, uint64_t* bytes);

    // The next message's bytes. REQUIRES: next() gave `bytes`, and was not followed by this.
    void receive(int reader, std::byte* data, uint64_t bytes);

    // As above, waiting as long as the members' time-out.
    uint64_t next(int reader);

  private:
    void write(const std::byte* data, uint64_t bytes, bool last);
    void read(int reader, std::byte* data, uint64_t bytes);
    uint64_t free_space();

    const Members& members_;
    ChannelState* state_;
    std::byte* ring_;
    uint64_t capacity_;
    int writer_;
    std::vector<int> readers_;
};

}  // namespace tokenspeed::shm
