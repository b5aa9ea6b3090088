// SPDX-License-Identifier: MIT
// Collectives of processes of one machine over a shared segment. Knows bytes, no tensors.
//
// Each rank has an area of two halves. A collective is one or more rounds: a rank writes its half
// of round k (k mod 2), then announces k, then reads the others' halves of round k.
//
// 1. announced[r] never falls; a half is written before its round is announced.
// 2. A rank begins round k after it has finished reading those of k - 1 and before. So whoever sees
//    announced[r] >= k - 1 knows that r reads no half of round k - 2 any more: that one is free.
// 3. Every half carries a stamp of the call it belongs to. A rank that reads another rank's half
// and
//    finds another stamp throws: the ranks disagree on what to do.
// 4. Sums run in the order of ranks and every element is summed by the same rule: all ranks get the
//    same bits, whichever way the sum took.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "channel.h"
#include "members.h"
#include "segment.h"
#include "sum.h"

namespace tokenspeed::shm {

inline constexpr size_t kHalfBytes = 256 * 1024;    // data of one rank in one round
inline constexpr size_t kMailboxBytes = 64 * 1024;  // from one rank to another
inline constexpr size_t kOneShotBytes = 32 * 1024;  // larger sums of three ranks or more are shared

// A tensor [outer, sum(sizes), inner] that is cut along its middle axis; `inner` in bytes.
struct Pieces {
    int64_t outer;
    std::vector<int64_t> sizes;
    int64_t inner;

    int64_t total() const;
    int64_t offset(int piece) const;  // along the middle axis
};

class Group {
  public:
    // Makes the segment (the first of `ranks`) or opens it, and waits until all are there. `ranks`
    // are the names in messages. `parent`: members whose death ends the wait, or null.
    Group(const std::string& name, std::vector<int> ranks, int index,
          std::chrono::nanoseconds timeout, const Members* parent, void (*on_tick)());
    // Over `memory` that the members have already, all zero at first: threads of one process.
    // REQUIRES: 64-byte aligned, segment_bytes(ranks.size()).
    Group(std::byte* memory, std::vector<int> ranks, int index, std::chrono::nanoseconds timeout);
    ~Group();
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    static size_t segment_bytes(int size);

    const Members& members() const { return members_; }
    int size() const { return members_.size(); }
    int index() const { return members_.self(); }
    void leave() { members_.leave(); }

    // All must make the same calls with fitting arguments: std::runtime_error where they do not.
    // RankDied: a member died, left, or did not answer in time; the group is of no use afterwards.
    void all_reduce(DType dtype, int64_t count, std::byte* x);
    void all_gather(const Pieces& pieces, const std::byte* x, std::byte* out);
    void reduce_scatter(DType dtype, const Pieces& pieces, const std::byte* x, std::byte* out);
    // Bytes for and from each rank.
    void all_to_all(const std::vector<int64_t>& send, const std::byte* x,
                    const std::vector<int64_t>& receive, std::byte* out);
    void broadcast(int64_t bytes, int root, std::byte* x);
    void send(int64_t bytes, int to, const std::byte* x);
    void receive(int64_t bytes, int source, std::byte* x);

  private:
    enum class Kind : uint32_t { kAllReduce, kAllGather, kReduceScatter, kAllToAll, kBroadcast };
    struct Stamp {
        Kind kind;
        uint32_t detail;  // the dtype, or the root
        uint64_t arguments;
        bool operator==(const Stamp&) const = default;
    };
    struct alignas(64) Half {
        Stamp stamp;
        int64_t offsets[kMaxMembers + 1];  // all_to_all: where each rank's bytes begin
        alignas(64) std::byte data[kHalfBytes];
    };
    struct alignas(64) Area {
        std::atomic<uint32_t> announced{0};
        Bell bell;
        Half halves[2];
    };

    void meet();  // waits until all members are there
    static Segment connect(const std::string& name, int size, int index, Clock::time_point deadline,
                           const Members* parent, void (*on_tick)());
    Area& area(int member) const;
    Channel channel(int from, int to) const;

    Half& begin(const Stamp& stamp);  // this rank's half of a new round
    void announce();
    const Half& other(int member);  // its half of the present round; waits for it
    void sum_shared(const Stamp& stamp, DType dtype, int64_t count, std::byte* x);

    Segment segment_;
    std::byte* memory_;
    Members members_;
    uint32_t round_ = 0;
    Stamp stamp_{};
};

}  // namespace tokenspeed::shm
