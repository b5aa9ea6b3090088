// SPDX-License-Identifier: MIT
#include "scheduler/pages.h"

#include <algorithm>

namespace tokenspeed {

PagePool::PagePool(int num_pages) : kind_(num_pages, Kind::kFree), users_(num_pages, 0) {
    free_.resize(num_pages);
    for (int i = 0; i < num_pages; ++i) free_[i] = num_pages - 1 - i;
}

PagePool::~PagePool() { TS_CHECK(free_.size() == kind_.size()); }

FreePage PagePool::take() {
    if (free_.empty()) reclaim(keeper_->give_back());
    const PageId page = free_.back();
    free_.pop_back();
    return FreePage(this, page);
}

WritablePage PagePool::open(FreePage page) {
    page.pool_ = nullptr;
    kind_[page.id_] = Kind::kWritable;
    users_[page.id_] = 1;
    return WritablePage(this, page.id_);
}

SealedPage PagePool::seal(WritablePage page, const Settled&) {
    page.pool_ = nullptr;
    kind_[page.id_] = Kind::kSealed;
    return SealedPage(this, page.id_);
}

SealedPage PagePool::share_kept(PageId page) {
    TS_CHECK(kind_[page] == Kind::kSealed);
    if (mutant(Mutant::kK4ShareNotCounted) && users_[page] > 0) return SealedPage(this, page);
    if (users_[page]++ == 0) keeper_->reused(page);
    return SealedPage(this, page);
}

void PagePool::reclaim(PageId page) {
    TS_CHECK(kind_[page] == Kind::kSealed && users_[page] == 0);
    put_back(page);
}

void PagePool::put_back(PageId page) {
    kind_[page] = Kind::kFree;
    users_[page] = 0;
    free_.push_back(page);
}

void PagePool::drop(PageId page) {
    if (--users_[page] > 0) return;
    if (!keeper_->keep(page) || mutant(Mutant::kK4KeptAndFreed)) put_back(page);
}

PageList::~PageList() {
    while (!open_.empty()) open_.pop_back();
    while (!sealed_.empty()) sealed_.pop_back();
}

void PageList::seal_full(PagePool& pool, const Settled& proof, int page_size) {
    const int count = proof.tokens() / page_size - num_sealed();
    if (count <= 0) return;
    TS_CHECK(count <= static_cast<int>(open_.size()));
    for (int i = 0; i < count; ++i) sealed_.push_back(pool.seal(std::move(open_[i]), proof));
    open_.erase(open_.begin(), open_.begin() + count);
}

void PageList::drop_behind(int count) {
    TS_CHECK(count >= num_sealed());
    while (size() > count) open_.pop_back();
}

SlotPool::SlotPool(int num_slots) : leases_(num_slots, 0) {
    free_.resize(num_slots);
    for (int i = 0; i < num_slots; ++i) free_[i] = num_slots - 1 - i;
}

Slot SlotPool::take() {
    TS_CHECK(!free_.empty());
    const int slot = free_.back();
    free_.pop_back();
    return Slot(this, slot);
}

}  // namespace tokenspeed
