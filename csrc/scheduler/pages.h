// SPDX-License-Identifier: MIT
// Who owns which page and which slot, said in types. Knows nothing of requests, tokens or steps.
//
//   FreePage ----open----> WritablePage ----seal(Settled)------> SealedPage ----share---->
//   SealedPage nobody's                one writer                           immutable, any number
//   of readers
//
// Every handle is move-only and gives its page back when it dies. The last SealedPage of a page
// gives it to the keeper (the prefix index) if the keeper wants it, and to the free list if not.
//
// Invariants:
//  P1  A page is in exactly one of: the free list, one WritablePage, >= 1 SealedPages, the keeper.
//  P2  A Slot dies only when no step in flight holds a Lease on it (checked); the pages of a
//      request stand beside its Slot in one `Holdings`, so they cannot be freed under a step.
//  P3  Only `Settled` turns a writable page into a sealed one, only a `Committed` gives it, and
//  only
//      the commit of a step makes that. Only sealed pages can be published: what is unwritten, or
//      holds a draft that was rejected, is never published.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "scheduler/check.h"
#include "scheduler/mutant.h"

namespace tokenspeed {

using PageId = int32_t;
inline constexpr PageId kNoPage = -1;

class PagePool;
class Scheduler;

// Proof that the first `tokens` positions of one sequence are written, with tokens known for good.
class Settled {
  public:
    int32_t tokens() const { return tokens_; }
    Settled at_most(int32_t tokens) const { return Settled(std::min(tokens_, tokens)); }

  private:
    friend class Committed;
    explicit Settled(int32_t tokens) : tokens_(tokens) {}
    int32_t tokens_;
};

// Proof that a step committed. `computed` positions of one sequence are written; the last of them
// may hold drafts that were rejected, so that this alone seals no page.
class Committed {
  public:
    int32_t computed() const { return computed_; }
    Settled settled(int32_t num_rejected) const { return Settled(computed_ - num_rejected); }

  private:
    friend class Scheduler;
    friend class PageTestAccess;
    explicit Committed(int32_t computed) : computed_(computed) {}
    int32_t computed_;
};

// The part all three kinds share: a pool, an id, and moves that leave nothing behind.
class PageHandle {
  public:
    PageId id() const { return id_; }

  protected:
    PageHandle(PagePool* pool, PageId id) : pool_(pool), id_(id) {}
    PageHandle(PageHandle&& other) noexcept
        : pool_(mutant(Mutant::kK4MoveCopies) ? other.pool_ : std::exchange(other.pool_, nullptr)),
          id_(mutant(Mutant::kK4MoveCopies) ? other.id_ : std::exchange(other.id_, kNoPage)) {}
    PageHandle& operator=(PageHandle&&) = delete;
    ~PageHandle() = default;
    PagePool* pool_;
    PageId id_;
};

class FreePage : public PageHandle {
  public:
    FreePage(FreePage&&) noexcept = default;
    inline ~FreePage();

  private:
    friend class PagePool;
    using PageHandle::PageHandle;
};

class WritablePage : public PageHandle {
  public:
    WritablePage(WritablePage&&) noexcept = default;
    inline WritablePage& operator=(WritablePage&&) noexcept;
    inline ~WritablePage();

  private:
    friend class PagePool;
    using PageHandle::PageHandle;
};

class SealedPage : public PageHandle {
  public:
    SealedPage(SealedPage&&) noexcept = default;
    inline ~SealedPage();
    inline SealedPage share() const;

  private:
    friend class PagePool;
    using PageHandle::PageHandle;
};

// Keeps sealed pages that no one uses, and gives them back one by one when the pool runs dry.
class PageKeeper {
  public:
    virtual ~PageKeeper() = default;
    virtual bool keep(PageId page) = 0;    // the last user left; true: it now belongs to the keeper
    virtual void reused(PageId page) = 0;  // a kept page has a user again
    virtual PageId give_back() = 0;        // REQUIRES: num_kept() > 0
    virtual int num_kept() const = 0;
};

class PagePool {
  public:
    enum class Kind : uint8_t { kFree, kWritable, kSealed };

    explicit PagePool(int num_pages);
    ~PagePool();  // CHECKs that no page is out
    PagePool(const PagePool&) = delete;
    PagePool& operator=(const PagePool&) = delete;

    void set_keeper(PageKeeper* keeper) { keeper_ = keeper; }
    int num_pages() const { return static_cast<int>(kind_.size()); }
    int num_free() const { return static_cast<int>(free_.size()); }
    // Pages that `take` can hand out: the free ones and those the keeper would give back.
    int num_available() const { return num_free() + keeper_->num_kept(); }

    FreePage take();  // REQUIRES: num_available() > 0. O(1).
    WritablePage open(FreePage page);
    SealedPage seal(WritablePage page, const Settled& proof);
    SealedPage share_kept(PageId page);  // REQUIRES: the page is sealed, in use or kept
    void reclaim(PageId page);           // the keeper lets go of a page that no one uses

    Kind kind(PageId page) const { return kind_[page]; }
    int32_t num_users(PageId page) const { return users_[page]; }
    std::span<const PageId> free_list() const { return free_; }

  private:
    friend class FreePage;
    friend class WritablePage;
    friend class SealedPage;
    void put_back(PageId page);
    void drop(PageId page);

    std::vector<PageId> free_;
    std::vector<Kind> kind_;
    std::vector<int32_t> users_;
    PageKeeper* keeper_ = nullptr;
};

FreePage::~FreePage() {
    if (pool_ != nullptr) pool_->put_back(id_);
}
WritablePage::~WritablePage() {
    if (pool_ != nullptr) pool_->put_back(id_);
}
WritablePage& WritablePage::operator=(WritablePage&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(id_, other.id_);
    return *this;
}
SealedPage::~SealedPage() {
    if (pool_ != nullptr) pool_->drop(id_);
}
SealedPage SealedPage::share() const { return pool_->share_kept(id_); }

// The pages of one sequence: sealed ones first, then the ones being written. When it dies the
// deepest page goes first, so that the keeper sees leaves before their parents.
class PageList {
  public:
    PageList() = default;
    PageList(PageList&&) noexcept = default;
    PageList& operator=(PageList&&) = delete;
    ~PageList();

    void reserve(int num_pages) { sealed_.reserve(num_pages); }
    void adopt(SealedPage page) { sealed_.push_back(std::move(page)); }
    void append(WritablePage page) { open_.push_back(std::move(page)); }
    int size() const { return num_sealed() + static_cast<int>(open_.size()); }
    int num_sealed() const { return static_cast<int>(sealed_.size()); }
    const SealedPage& sealed(int index) const { return sealed_[index]; }
    PageId id(int index) const {
        return index < num_sealed() ? sealed_[index].id() : open_[index - num_sealed()].id();
    }
    // The pages [first, last) as targets of a write. A sealed page among them is a broken
    // invariant.
    std::span<const WritablePage> targets(int first, int last) const {
        TS_CHECK(first >= num_sealed() && last <= size());
        return std::span(open_).subspan(first - num_sealed(), last - first);
    }
    // Seals the pages that `proof` says are full.
    void seal_full(PagePool& pool, const Settled& proof, int page_size);
    // Gives back the pages behind the first `count`. REQUIRES: none of them is sealed.
    void drop_behind(int count);

  private:
    std::vector<SealedPage> sealed_;
    std::vector<WritablePage> open_;
};

// Pages that running requests were promised and have not taken yet. `firm` promises are kept
// whatever happens; `soft` ones only hold back the admission of further requests.
struct Ledger {
    int64_t soft = 0;
    int64_t firm = 0;
};

class Promise {
  public:
    Promise(Ledger* ledger, bool firm, int num_pages)
        : ledger_(ledger), firm_(firm), left_(num_pages) {
        total() += left_;
    }
    Promise(Promise&& other) noexcept
        : ledger_(other.ledger_), firm_(other.firm_), left_(std::exchange(other.left_, 0)) {}
    Promise& operator=(Promise&&) = delete;
    ~Promise() {
        if (!mutant(Mutant::kK11PromiseLeak)) total() -= left_;
    }
    bool firm() const { return firm_; }
    int num_left() const { return left_; }
    void take() {
        if (left_ == 0) return;
        --left_;
        --total();
    }

  private:
    int64_t& total() { return firm_ ? ledger_->firm : ledger_->soft; }
    Ledger* ledger_;
    bool firm_;
    int left_;
};

class SlotPool;

// A request's row in the device tables.
class Slot {
  public:
    Slot(Slot&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}
    Slot& operator=(Slot&&) = delete;
    inline ~Slot();
    int id() const { return id_; }
    inline bool leased() const;

  private:
    friend class SlotPool;
    Slot(SlotPool* pool, int id) : pool_(pool), id_(id) {}
    SlotPool* pool_;
    int id_;
};

// What a step in flight holds on each slot that it reads or writes.
class Lease {
  public:
    Lease(Lease&& other) noexcept : leases_(std::exchange(other.leases_, nullptr)) {}
    Lease& operator=(Lease&&) = delete;
    ~Lease() { release(); }
    void release() {
        if (leases_ != nullptr) --*std::exchange(leases_, nullptr);
    }

  private:
    friend class SlotPool;
    explicit Lease(int32_t* leases) : leases_(leases) { ++*leases_; }
    int32_t* leases_;
};

class SlotPool {
  public:
    explicit SlotPool(int num_slots);
    ~SlotPool() { TS_CHECK(free_.size() == leases_.size()); }
    SlotPool(const SlotPool&) = delete;
    SlotPool& operator=(const SlotPool&) = delete;
    int num_free() const { return static_cast<int>(free_.size()); }
    int num_slots() const { return static_cast<int>(leases_.size()); }
    int32_t num_leases(int slot) const { return leases_[slot]; }
    Slot take();  // REQUIRES: num_free() > 0
    Lease lease(const Slot& slot) { return Lease(&leases_[slot.id()]); }

  private:
    friend class Slot;
    std::vector<int> free_;
    std::vector<int32_t> leases_;
};

Slot::~Slot() {
    if (pool_ == nullptr) return;
    TS_CHECK(!leased());
    pool_->free_.push_back(id_);
}
bool Slot::leased() const { return pool_->leases_[id_] > 0; }

}  // namespace tokenspeed
