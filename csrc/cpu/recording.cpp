// SPDX-License-Identifier: MIT
#include "recording.h"

#include <bit>
#include <new>

namespace tokenspeed::cpu {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr size_t kLeastBlock = 256;

thread_local Recording* open_recording = nullptr;

size_t block_of(size_t bytes) { return std::bit_ceil(bytes < kLeastBlock ? kLeastBlock : bytes); }

}  // namespace

Arena::~Arena() {
    for (const auto& [size, blocks] : free_) {
        for (void* const block : blocks) operator delete(block, kAlign);
    }
}

void* Arena::take(size_t bytes) {
    const size_t size = block_of(bytes);
    const std::lock_guard lock(mutex_);
    std::vector<void*>& blocks = free_[size];
    if (blocks.empty()) {
        void* const made = operator new(size, kAlign);
        num_bytes_ += size;
        return made;
    }
    void* const block = blocks.back();
    blocks.pop_back();
    return block;
}

void Arena::give_back(void* block, size_t bytes) {
    const std::lock_guard lock(mutex_);
    free_[block_of(bytes)].push_back(block);
}

size_t Arena::num_bytes() const {
    const std::lock_guard lock(mutex_);
    return num_bytes_;
}

void Recording::replay() const {
    for (const auto& call : calls_) call();
}

Recording* Recording::open() { return open_recording; }

void Recording::begin(Recording& recording) { open_recording = &recording; }

void Recording::end() { open_recording = nullptr; }

}  // namespace tokenspeed::cpu
