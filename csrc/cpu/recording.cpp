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

struct Arena::Block {
    std::shared_ptr<Arena> arena;
    size_t size;
    void* data;

    ~Block() { arena->give_back(*this); }
};

Arena::~Arena() {
    for (const auto& [size, blocks] : free_) {
        for (void* const block : blocks) operator delete(block, kAlign);
    }
}

std::shared_ptr<void> Arena::take(size_t bytes) {
    const auto block = std::make_shared<Block>(shared_from_this(), block_of(bytes), nullptr);
    const std::lock_guard lock(mutex_);
    std::vector<void*>& blocks = free_[block->size];
    if (blocks.empty()) {
        blocks.push_back(operator new(block->size, kAlign));
        num_bytes_ += block->size;
    }
    block->data = blocks.back();
    taken_[block->data] = block.get();
    blocks.pop_back();
    return {block, block->data};
}

bool Arena::share(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = taken_.find(data);
    if (found == taken_.end()) return false;
    free_[found->second->size].push_back(data);
    found->second->data = nullptr;
    taken_.erase(found);
    return true;
}

void Arena::give_back(Block& block) {
    const std::lock_guard lock(mutex_);
    if (block.data == nullptr) return;
    taken_.erase(block.data);
    free_[block.size].push_back(block.data);
}

size_t Arena::num_bytes() const {
    const std::lock_guard lock(mutex_);
    return num_bytes_;
}

void Recording::replay(const StepSize& size) const {
    for (const Call& call : calls_) call(size);
}

Recording* Recording::open() { return open_recording; }

void Recording::begin(Recording& recording) { open_recording = &recording; }

void Recording::end() { open_recording = nullptr; }

}  // namespace tokenspeed::cpu
