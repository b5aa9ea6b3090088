// SPDX-License-Identifier: MIT
#include "scheduler/prefix_index.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace tokenspeed {

namespace {
constexpr int kLeafSearch = 4;     // kept pages passed over because others build on them
constexpr int kSiblingSearch = 8;  // branches looked at, the newest first
constexpr int kGhosts = 4;         // hashes remembered for each page
}  // namespace

PrefixIndex::PrefixIndex(PagePool& pool, int page_size, HashKey key,
                         std::unique_ptr<EvictionPolicy> policy)
    : pool_(pool),
      page_size_(page_size),
      key_(key),
      policy_(std::move(policy)),
      entries_(pool.num_pages()),
      tokens_(new int32_t[int64_t{pool.num_pages()} * page_size]),
      table_(std::bit_ceil(static_cast<size_t>(pool.num_pages()) * 2), kNoPage),
      ghosts_(pool.num_pages() * kGhosts) {
    pool.set_keeper(this);
}

Hash128 PrefixIndex::root(std::span<const uint8_t> salt) const {
    return siphash128(key_, salt.data(), mutant(Mutant::kI10SaltIgnored) ? 0 : salt.size());
}

Hash128 PrefixIndex::link(Hash128 parent, std::span<const int32_t> tokens) const {
    return chain_hash(key_, parent, tokens.data(), tokens.size_bytes());
}

// The table's index of this hash, or of the empty place where it would stand.
int PrefixIndex::probe(Hash128 hash) const {
    const size_t mask = table_.size() - 1;
    size_t at = hash.low & mask;
    while (table_[at] != kNoPage && entries_[table_[at]].hash != hash) at = (at + 1) & mask;
    return static_cast<int>(at);
}

PageId PrefixIndex::find(Hash128 hash, std::span<const int32_t> tokens) const {
    const PageId page = table_[probe(hash)];
    if (page == kNoPage || !std::ranges::equal(this->tokens(page), tokens)) return kNoPage;
    return page;
}

void PrefixIndex::publish(const SealedPage& sealed, Hash128 parent, Hash128 hash,
                          std::span<const int32_t> tokens, bool generated) {
    const int at = probe(hash);
    if (table_[at] != kNoPage) return;
    const PageId page = sealed.id();
    TS_CHECK(!entries_[page].published);
    table_[at] = page;
    std::ranges::copy(tokens, tokens_.get() + int64_t{page} * page_size_);
    entries_[page] = Entry{.hash = hash, .published = true, .generated = generated};
    const PageId above = table_[probe(parent)];
    if (above != kNoPage) attach(page, above);
    supersede_siblings(page);
}

void PrefixIndex::forget(const SealedPage& page) {
    if (!entries_[page.id()].published) return;
    policy_->unretain(page.id());
    table_erase(page.id());
    detach(page.id());
}

int PrefixIndex::clear() {
    const int count = num_kept_;
    while (num_kept_ > 0) pool_.reclaim(give_back());
    return count;
}

bool PrefixIndex::keep(PageId page) {
    if (!entries_[page].published) return false;
    policy_->idle(page);
    ++num_kept_;
    return true;
}

void PrefixIndex::reused(PageId page) {
    entries_[page].superseded = false;
    policy_->removed(page);
    --num_kept_;
}

PageId PrefixIndex::give_back() {
    PageId page = policy_->victim();
    for (int i = 0; i < kLeafSearch && entries_[page].first_child != kNoPage; ++i) {
        policy_->postpone(page);
        page = policy_->victim();
    }
    remove(page);
    return page;
}

void PrefixIndex::drop(PageId page) {
    TS_CHECK(entries_[page].published && pool_.num_users(page) == 0);
    remove(page);
    pool_.reclaim(page);
}

// Forgets a kept page.
void PrefixIndex::remove(PageId page) {
    if (!mutant(Mutant::kK4VictimStays)) policy_->removed(page);
    if (!mutant(Mutant::kR2MarkOutlivesPage)) policy_->unretain(page);
    --num_kept_;
    ghosts_.add(entries_[page].hash);
    table_erase(page);
    detach(page);
}

void PrefixIndex::retain(PageId page, TimeUs deadline, bool pinned) {
    TS_CHECK(entries_[page].published);
    entries_[page].superseded = false;
    policy_->retain(page, deadline, pinned);
}

Miss PrefixIndex::why(Hash128 hash, PageId parent) const {
    if (ghosts_.contains(hash)) return Miss::kEvicted;
    const bool goes_on = parent != kNoPage && entries_[parent].first_child != kNoPage;
    return goes_on ? Miss::kDiverged : Miss::kNeverCached;
}

int PrefixIndex::own_tail(std::span<const PageId> run) const {
    auto first = static_cast<int>(run.size());
    for (PageId below = kNoPage; first > 0; below = run[--first]) {
        PageId child = entries_[run[first - 1]].first_child;
        while (child != kNoPage && (child == below || entries_[child].superseded)) {
            child = entries_[child].next_sibling;
        }
        if (child != kNoPage) break;
    }
    return first;
}

// Removes the page from the table and closes the gap (backward shift, no tombstones).
void PrefixIndex::table_erase(PageId page) {
    const size_t mask = table_.size() - 1;
    size_t hole = probe(entries_[page].hash);
    for (size_t at = (hole + 1) & mask; table_[at] != kNoPage; at = (at + 1) & mask) {
        const size_t home = entries_[table_[at]].hash.low & mask;
        if (((at - home) & mask) < ((at - hole) & mask)) continue;
        table_[hole] = table_[at];
        hole = at;
    }
    table_[hole] = kNoPage;
    entries_[page].published = false;
}

void PrefixIndex::attach(PageId page, PageId parent) {
    Entry& entry = entries_[page];
    entry.parent = parent;
    entry.next_sibling = entries_[parent].first_child;
    if (entry.next_sibling != kNoPage) entries_[entry.next_sibling].previous_sibling = page;
    entries_[parent].first_child = page;
}

// Takes the page out of the tree. Its children, if any, become roots of their own.
void PrefixIndex::detach(PageId page) {
    Entry& entry = entries_[page];
    if (entry.previous_sibling != kNoPage) {
        entries_[entry.previous_sibling].next_sibling = entry.next_sibling;
    } else if (entry.parent != kNoPage) {
        entries_[entry.parent].first_child = entry.next_sibling;
    }
    if (entry.next_sibling != kNoPage) {
        entries_[entry.next_sibling].previous_sibling = entry.previous_sibling;
    }
    for (PageId child = entry.first_child; child != kNoPage;) {
        const PageId next = entries_[child].next_sibling;
        entries_[child].parent = entries_[child].next_sibling = kNoPage;
        entries_[child].previous_sibling = kNoPage;
        child = next;
    }
    entry.parent = entry.first_child = entry.next_sibling = entry.previous_sibling = kNoPage;
}

// A conversation goes on from the parent of `page`: what an earlier turn sampled there instead
// (its thinking, say, which the next prompt leaves out) will not be asked for again.
void PrefixIndex::supersede_siblings(PageId page) {
    PageId old = entries_[page].next_sibling;
    for (int i = 0; i < kSiblingSearch && old != kNoPage; ++i) {
        if (entries_[old].generated && can_supersede(old)) supersede(old);
        old = entries_[old].next_sibling;
    }
}

bool PrefixIndex::can_supersede(PageId page) const {
    return pool_.num_users(page) == 0 && !entries_[page].superseded && !policy_->pinned(page);
}

// Marks a branch from its top down; stops at pages in use or already marked.
void PrefixIndex::supersede(PageId top) {
    walk_.assign(1, top);
    for (size_t i = 0; i < walk_.size(); ++i) {
        policy_->superseded(walk_[i]);
        entries_[walk_[i]].superseded = true;
        for (PageId child = entries_[walk_[i]].first_child; child != kNoPage;
             child = entries_[child].next_sibling) {
            if (can_supersede(child)) walk_.push_back(child);
        }
    }
}

}  // namespace tokenspeed
