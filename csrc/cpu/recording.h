// SPDX-License-Identifier: MIT
// A recorded step: the kernel calls that a thread made, in order, to be made again. Knows calls and
// memory; refuses to know tensors and what a call computes.
//
// Invariants
// 1. A call is recorded after it has run, with everything it needs copied into it. Whatever a
// kernel
//    derives from values in memory (ids, lengths) it derives while it runs, never before.
// 2. Results made while recording stand in the recording's arena. A block that is given back may be
//    taken again by a later call of the same recording: replays make the calls in the same order,
//    so they overwrite it at the same time.
// 3. Recordings of one arena share its blocks: one of them runs at a time, and what one computed
//    lasts until another one runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace tokenspeed::cpu {

// Memory in blocks of powers of two, 64-byte aligned. Blocks that are given back are kept.
class Arena : public std::enable_shared_from_this<Arena> {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();

    // A block with undefined contents, given back with the last reference. Throws std::bad_alloc.
    std::shared_ptr<void> take(size_t bytes);
    // Gives the block back at once although it is still referred to: whoever reads it must do so
    // before others write. False if it is not a block that is taken.
    bool share(void* data);
    // Bytes of all blocks, taken or not.
    size_t num_bytes() const;

  private:
    struct Block;

    void give_back(Block& block);

    mutable std::mutex mutex_;
    std::map<size_t, std::vector<void*>> free_;  // by size
    std::map<void*, Block*> taken_;
    size_t num_bytes_ = 0;
};

class Recording {
  public:
    explicit Recording(std::shared_ptr<Arena> arena) : arena_(std::move(arena)) {}

    const std::shared_ptr<Arena>& arena() const { return arena_; }
    size_t num_calls() const { return calls_.size(); }
    void append(std::function<void()> call) { calls_.push_back(std::move(call)); }
    // Makes every call again. What a recorded check throws ends it.
    void replay() const;

    // The recording that is open on this thread, or null.
    static Recording* open();
    // REQUIRES: none is open on this thread; it outlives its being open.
    static void begin(Recording& recording);
    static void end();

  private:
    std::shared_ptr<Arena> arena_;
    std::vector<std::function<void()>> calls_;
};

// Does `work` now and, if a recording is open, whenever that is replayed.
template <typename Work>
void perform(Work&& work) {
    work();
    if (Recording* const recording = Recording::open()) {
        recording->append(std::forward<Work>(work));
    }
}

}  // namespace tokenspeed::cpu
