// SPDX-License-Identifier: MIT
// A broadcast ring: one writer, some readers, messages of any size, each read by every reader.
//
// Member 0 of the segment is the writer, member 1 + i the i-th reader; in messages their ranks are
// the same numbers. Waiting and death: members.h; the bytes: channel.h.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "channel.h"
#include "members.h"
#include "segment.h"

namespace tokenspeed::shm {

class Ring {
  public:
    // The writer makes the memory, the readers open it. Readers wait for it here.
    static std::unique_ptr<Ring> write(const std::string& name, int num_readers, size_t capacity,
                                       std::chrono::nanoseconds timeout, void (*on_tick)());
    static std::unique_ptr<Ring> read(const std::string& name, int num_readers, int reader,
                                      size_t capacity, std::chrono::nanoseconds timeout,
                                      void (*on_tick)());
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Writer: waits until every reader has come. The name is gone then.
    void connect();

    // Writer: returns when the message is in the ring. Waits for readers that are behind by the
    // ring's size. RankDied: a reader died or left, or took nothing for the time-out.
    void send(const std::byte* data, uint64_t bytes);

    // Reader: the next message's length; false if none came until `deadline`. RankDied: the writer
    // or another reader died, or the writer left and everything is read.
    bool next(Clock::time_point deadline, uint64_t* bytes);

    // Reader. REQUIRES: next() gave `bytes`, and was not followed by this.
    void receive(std::byte* data, uint64_t bytes);

    void leave() { members_.leave(); }

  private:
    Ring(Segment segment, int num_readers, int self, size_t capacity,
         std::chrono::nanoseconds timeout, void (*on_tick)());

    Segment segment_;
    int num_readers_;
    Members members_;
    Channel channel_;
};

}  // namespace tokenspeed::shm
