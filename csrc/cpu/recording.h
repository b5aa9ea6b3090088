// SPDX-License-Identifier: MIT
// A recorded step: the kernel calls that a thread made, in order, to be made again, in a step of
// the same size or, if all calls allow it, of another one. Knows calls and memory; refuses to know
// tensors and what a call computes.
//
// Invariants
// 1. A call is recorded after it has run, with everything it needs copied into it. What a kernel
//    derives from values in memory (ids, lengths) it derives while it runs, never before.
// 2. Results made while recording stand in the recording's arena. A block that is given back may be
//    taken again by a later call of the same recording: replays make the calls in the same order,
//    so they overwrite it at the same time.
// 3. Recordings of one arena share its blocks: one of them runs at a time, and what one computed
//    lasts until another one runs.
// 4. Results have their tokens on the first axis, and blocks have room for `room` tokens of each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "step_size.h"

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
    using Call = std::function<void(const StepSize&)>;

    // REQUIRES: 1 <= size.num_tokens <= room.
    Recording(std::shared_ptr<Arena> arena, StepSize size, int64_t room)
        : arena_(std::move(arena)), size_(size), room_(room) {}

    const std::shared_ptr<Arena>& arena() const { return arena_; }
    const StepSize& size() const { return size_; }  // of the step that was recorded
    size_t num_calls() const { return calls_.size(); }
    // Most tokens of a step that this serves; the recorded size alone if it is_fixed().
    int64_t room() const { return is_fixed_ ? size_.num_tokens : room_; }
    bool is_fixed() const { return is_fixed_; }
    bool serves(const StepSize& size) const {
        return size == size_ || (!is_fixed_ && size.num_tokens >= 1 && size.num_tokens <= room_);
    }
    // Of a result that takes so many in the recorded step.
    size_t bytes_with_room(size_t bytes) const {
        return (bytes * room_ - 1) / size_.num_tokens + 1;
    }
    void append(Call call) { calls_.push_back(std::move(call)); }
    // A call was recorded that holds for steps of this size only.
    void fix() { is_fixed_ = true; }
    // Makes every call again. What a recorded check throws ends it. REQUIRES: serves(size).
    void replay(const StepSize& size) const;

    // The recording that is open on this thread, or null.
    static Recording* open();
    // REQUIRES: none is open on this thread; it outlives its being open.
    static void begin(Recording& recording);
    static void end();

  private:
    std::shared_ptr<Arena> arena_;
    StepSize size_;
    int64_t room_;
    bool is_fixed_ = false;
    std::vector<Call> calls_;
};

// Does `work(params)` now and, if a recording is open, whenever that is replayed, with the params
// of a step of that size.
template <typename Params, typename Work>
void perform(const Params& params, Work work) {
    work(params);
    Recording* const recording = Recording::open();
    if (recording == nullptr) return;
    const StepSize from = recording->size();
    Params probe = params;
    if (!resize(probe, from, from)) recording->fix();
    recording->append([params, work = std::move(work), from](const StepSize& to) {
        Params resized = params;
        resize(resized, from, to);
        work(resized);
    });
}

}  // namespace tokenspeed::cpu
