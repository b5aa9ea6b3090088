// SPDX-License-Identifier: MIT
// For tests: the scheduler's own books, checked against each other from scratch, and a hash of its
// state. Changes nothing.
#include <algorithm>
#include <map>
#include <set>

#include "scheduler/scheduler.h"

namespace tokenspeed {

namespace {

void expect(bool condition, const char* what, std::string& broken) {
    if (!condition && broken.empty()) broken = what;
}

class Mixer {
  public:
    void add(uint64_t value) { hash_.word(value); }
    void add(std::span<const int32_t> values) {
        add(values.size());
        for (int32_t value : values) add(static_cast<uint64_t>(value));
    }
    uint64_t result() { return hash_.finish(nullptr, 0).low; }

  private:
    SipHash128 hash_{HashKey{}};
};

// Pages by order of first mention: two states that differ only in page names look the same.
class PageNames {
  public:
    uint64_t of(PageId page) { return names_.emplace(page, names_.size()).first->second; }

  private:
    std::map<PageId, uint64_t> names_;
};

}  // namespace

std::vector<const Request*> Scheduler::all_requests() const {
    std::vector<const Request*> all(running_.begin(), running_.end());
    for (const auto& [arrival, entry] : waiting_.all()) all.push_back(entry.request);
    for (const auto& request : draining_) all.push_back(request.get());
    std::ranges::sort(all, {}, &Request::arrival);
    return all;
}

std::string Scheduler::broken_invariant() const {
    std::string broken;
    check_pages(broken);
    check_retention(broken);
    check_requests(broken);
    return broken;
}

void Scheduler::check_pages(std::string& broken) const {
    std::vector<int> users(pool_.num_pages(), 0), writers(users), free(users), kept(users);
    for (const Request* request : all_requests()) {
        const Holdings* held = holdings(request->state);
        for (int i = 0; held != nullptr && i < held->pages.size(); ++i) {
            (i < held->pages.num_sealed() ? users : writers)[held->pages.id(i)] += 1;
        }
    }
    for (PageId page : pool_.free_list()) free[page] += 1;
    std::vector<PageId> order;
    index_.policy().order(order);
    for (PageId page : order) kept[page] += 1;
    expect(std::ssize(order) == index_.num_kept(), "I1: kept pages are miscounted", broken);
    for (PageId page = 0; page < pool_.num_pages(); ++page) {
        const int places = free[page] + kept[page] + writers[page] + (users[page] > 0);
        expect(places == 1, "I1: a page is not in exactly one place", broken);
        expect(pool_.num_users(page) == users[page] + writers[page], "I1: wrong user count",
               broken);
        const bool sealed = pool_.kind(page) == PagePool::Kind::kSealed;
        expect(sealed == (users[page] + kept[page] > 0), "I2: kind and owner disagree", broken);
        expect(!index_.published(page) || sealed, "I3: an unwritten page is published", broken);
        expect(index_.published(page) || kept[page] == 0, "I3: kept but not findable", broken);
        const bool finds =
            !index_.published(page) || index_.find(index_.hash(page), index_.tokens(page)) == page;
        expect(finds, "I4: a published page is not found by its key", broken);
    }
}

void Scheduler::check_retention(std::string& broken) const {
    const EvictionPolicy& policy = index_.policy();
    std::vector<PageId> marks;
    policy.marks(marks);
    expect(std::ssize(marks) == policy.num_retained() + policy.num_pinned(),
           "R1: marks are miscounted", broken);
    expect(std::ssize(marks) <= max_retained(), "R1: over the budget of retention", broken);
    for (PageId page : marks) {
        expect(index_.published(page), "R2: a page is marked that nobody can find", broken);
        expect(policy.pinned(page) || policy.deadline(page) > 0, "R2: an empty mark", broken);
    }
}

void Scheduler::check_requests(std::string& broken) const {
    std::vector<int> leases(slots_.num_slots(), 0), drafts(leases);
    std::vector<bool> alone(slots_.num_slots(), false);
    for (const Step& step : in_flight_) {
        for (const Row& row : step.rows) {
            expect(!alone[row.slot], "M1: a row follows one that speculates", broken);
            expect(row.draft.empty() || leases[row.slot] == 0, "M1: drafts behind a row", broken);
            ++leases[row.slot];
            drafts[row.slot] += row.num_draft();
            alone[row.slot] = row.speculates();
        }
    }
    Ledger ledger;
    int num_held = 0;
    for (const Request* request : all_requests()) {
        expect(!std::holds_alternative<Finished>(request->state), "I7: Finished is kept", broken);
        expect(request->retractions <= options_.max_retractions, "I9: retracted too often", broken);
        expect(std::ssize(request->chain) <= request->known() / options_.page_size,
               "the chain covers unknown tokens", broken);
        const Holdings* held = holdings(request->state);
        if (held == nullptr) continue;
        ++num_held;
        const int slot = held->slot.id();
        const bool draining = std::holds_alternative<Draining>(request->state);
        expect(slots_.num_leases(slot) == leases[slot], "I2: leases are miscounted", broken);
        expect(!draining || leases[slot] > 0, "I7: Draining without a step in flight", broken);
        expect(held->settled <= held->scheduled, "I5: settled beyond scheduled", broken);
        expect((leases[slot] > 0) == (held->settled < held->scheduled), "I5: lost step", broken);
        expect(held->pages.num_sealed() * options_.page_size <= held->settled,
               "I3: sealed beyond what is settled", broken);
        expect(held->alone == alone[slot], "M1: who speculates is not agreed", broken);
        expect(held->scheduled <= held->pages.size() * options_.page_size, "I13: no page", broken);
        expect(held->scheduled < request->limit, "planned beyond the limit", broken);
        expect(draining || held->settled <= request->known(), "I5: settled and unknown", broken);
        const int32_t firm = held->scheduled - drafts[slot];  // as if all drafts were rejected
        expect(draining || firm <= request->known() + leases[slot], "I5", broken);
        expect(draining || options_.overlap_depth > 0 || firm <= request->known(),
               "M1: planned before its token is known", broken);
        (held->promise.firm() ? ledger.firm : ledger.soft) += held->promise.num_left();
    }
    expect(ledger.soft == ledger_.soft && ledger.firm == ledger_.firm, "promises differ", broken);
    expect(pool_.num_available() >= ledger_.firm, "a firm promise has no pages", broken);
    expect(num_held + slots_.num_free() == slots_.num_slots(), "I1: a slot is lost", broken);
    const bool sorted = std::ranges::is_sorted(running_, {}, &Request::arrival);
    expect(sorted, "running requests are not in order of arrival", broken);
    const auto num_waiting = static_cast<size_t>(waiting_.size());
    expect(live_.size() == running_.size() + num_waiting, "a live request is lost", broken);
    int64_t num_of_users = 0;
    std::set<const FairQueue::User*> users;
    for (const Request* request : all_requests()) {
        const FairQueue::User* user = request->user;
        if (user != nullptr && users.insert(user).second) num_of_users += user->num_live;
    }
    expect(num_of_users == std::ssize(live_), "F: a user's requests are miscounted", broken);
}

// Where a decoding request stands in the order of turns. Only micro-steps look at it.
uint64_t Scheduler::turn(const Request& request) const {
    const auto decodes = [](const Request& r) { return std::holds_alternative<Decoding>(r.state); };
    if (options_.num_micro_steps == 1 || !decodes(request)) return 0;
    return std::ranges::count_if(running_, [&](const Request* other) {
        return decodes(*other) && other->served < request.served;
    });
}

uint64_t Scheduler::state_hash() const {
    Mixer mix;
    PageNames names;
    for (const Request* request : all_requests()) {
        for (uint64_t word : {request->id, uint64_t(request->state.index()),
                              uint64_t(request->retractions), uint64_t(request->limit)}) {
            mix.add(word);
        }
        mix.add(static_cast<uint64_t>(request->priority));
        mix.add(request->key);
        mix.add(request->tokens);
        mix.add(request->draft);
        mix.add(request->num_propose);
        mix.add(turn(*request));
        mix.add(request->user == nullptr ? 0 : request->user->key);
        mix.add(request->user == nullptr ? 0 : request->user->tag);
        const Holdings* held = holdings(request->state);
        mix.add(held == nullptr ? 0 : held->slot.id() + 1);
        if (held == nullptr) continue;
        mix.add(uint64_t(held->settled) << 32 | uint64_t(held->scheduled));
        mix.add(uint64_t(held->promise.firm()) << 32 | uint64_t(held->promise.num_left()));
        for (int i = 0; i < held->pages.size(); ++i) mix.add(names.of(held->pages.id(i)));
        mix.add(held->pages.num_sealed());
    }
    std::vector<PageId> order;
    index_.policy().order(order);
    mix.add(order.size());
    for (PageId page : order) mix.add(names.of(page));
    std::vector<PageId> marks;
    index_.policy().marks(marks);
    for (PageId page : marks) {
        mix.add(names.of(page));
        mix.add(static_cast<uint64_t>(index_.policy().deadline(page)));
        mix.add(index_.policy().pinned(page));
    }
    mix.add(static_cast<uint64_t>(now_));
    mix.add(waiting_.virtual_time());
    for (const auto& [arrival, entry] : waiting_.all()) mix.add(entry.num_passed);
    std::map<uint64_t, PageId> published;
    for (PageId page = 0; page < pool_.num_pages(); ++page) {
        if (index_.published(page)) published.emplace(index_.hash(page).low, page);
    }
    for (const auto& [hash, page] : published) {
        mix.add(hash);
        mix.add(names.of(page));
    }
    for (const Step& step : in_flight_) {
        mix.add(step.rows.size());
        for (const Row& row : step.rows) {
            mix.add(row.request->id);
            mix.add(uint64_t(row.start) << 32 | uint64_t(row.num_tokens));
            mix.add(row.draft);
            mix.add(row.num_propose);
        }
    }
    return mix.result();
}

}  // namespace tokenspeed
