// SPDX-License-Identifier: MIT
// What every plan, and every state between two moves, must satisfy. Numbers I.. are the invariants
// and K.. the classes of bugs that docs/scheduler.md lists.
#include <algorithm>

#include "explore_world.h"

namespace tokenspeed {

void World::plan() {
    const int num_published = Inspector(*scheduler_).num_published();
    const Stats before = scheduler_->stats();
    const int64_t num_marks = before.num_retained_pages + before.num_pinned_pages;
    num_decoding_ = num_decoding();
    const std::span<const int32_t> words = scheduler_->next_plan();
    unbind_retracted();
    coverage_.evictions += check_ && Inspector(*scheduler_).num_published() < num_published;
    const Stats after = scheduler_->stats();
    coverage_.retained += check_ && num_marks > 0;
    coverage_.marks_evicted +=
        check_ && after.num_retained_pages + after.num_pinned_pages < num_marks;
    planned_ = !words.empty();
    if (!planned_) return demand(!flights_.empty() || !any_live(), "I9: nobody can run: stuck");
    demand(words[kPlanHeaderMagic] == kPlanMagic && words[kPlanHeaderVersion] == kLayoutVersion &&
               words[kPlanHeaderTotalWords] == std::ssize(words) &&
               words[kPlanHeaderNumCopies] == 0,
           "the plan's header is wrong");
    demand(words[kPlanHeaderStepLow] == static_cast<int32_t>(next_step_), "steps are not counted");
    ++next_step_;
    auto rest = words.subspan(kPlanHeaderWords);
    const auto section = [&](int count, int width) {
        demand(count >= 0 && count * width <= std::ssize(rest), "a section is cut short");
        const auto part = rest.first(count * width);
        rest = rest.subspan(count * width);
        return part;
    };
    const auto rows = section(words[kPlanHeaderNumRows], kRowWords);
    const auto tokens = section(words[kPlanHeaderNumTokens], 1);
    const auto deltas = section(words[kPlanHeaderNumDeltas], kDeltaWords);
    take_binds(section(words[kPlanHeaderNumBinds], kBindWords));
    demand(rest.empty(), "the plan has words left over");
    take_deltas(deltas);
    Flight flight{.header = {words[kPlanHeaderStepLow], words[kPlanHeaderStepHigh]}, .rows = {}};
    for (size_t at = 0; at < rows.size(); at += kRowWords) {
        take_row(rows.subspan(at, kRowWords), tokens, flight);
    }
    if (check_) {
        for (const Row& row : flight.rows) check_writes(row, flight);
        check_budget(flight);
        count(flight);
    }
    flights_.push_back(std::move(flight));
}

// A request that was retracted inside next_plan has no slot any more.
void World::unbind_retracted() {
    for (const LifeOf& life : clients_) {
        if (!life || !life->live || life->slot < 0) continue;
        const Request* request = scheduler_->find(id_of(life->client));
        demand(request != nullptr, "I7: a live request is lost");
        if (request->retractions == life->retractions) continue;
        demand(!in_flight(*life), "I2: retracted while a step in flight uses its pages");
        unbind(*life);
        coverage_.retractions += check_;
    }
}

void World::take_binds(std::span<const int32_t> words) {
    for (; !words.empty(); words = words.subspan(kBindWords)) {
        const int slot = words[0];
        const uint64_t id =
            uint64_t{static_cast<uint32_t>(words[2])} << 32 | static_cast<uint32_t>(words[1]);
        int who = 0;
        while (who < static_cast<int>(clients_.size()) && id_of(who) != id) ++who;
        demand(who < static_cast<int>(clients_.size()), "I7: an unknown request is bound");
        const LifeOf& life = clients_[who];
        demand(slot >= 0 && slot < static_cast<int>(owner_.size()), "a slot that does not exist");
        demand(live(who), "I7: a request that is over is bound");
        demand(owner_[slot] == nullptr, "I2: a slot is bound again while in use");
        demand(life->slot < 0, "a request is bound twice");
        demand(words[3] == static_cast<int32_t>(life->tokens.size()), "bound with wrong tokens");
        owner_[slot] = life;
        tables_[slot].clear();
        life->slot = slot;
        life->retractions = scheduler_->find(id)->retractions;
        life->next = -1;
        life->sampled = false;
        life->device_tokens = life->tokens;
    }
}

void World::take_deltas(std::span<const int32_t> words) {
    for (; !words.empty(); words = words.subspan(kDeltaWords)) {
        const auto [group, slot, index, page] = std::tuple(words[0], words[1], words[2], words[3]);
        demand(group == 0 && slot >= 0 && slot < static_cast<int>(owner_.size()), "a wrong delta");
        demand(owner_[slot] != nullptr, "K15: a page for a slot that is not bound");
        demand(page >= 0 && page < scenario_.options.num_pages, "a page that does not exist");
        std::vector<PageId>& table = tables_[slot];
        demand(index == static_cast<int>(table.size()), "pages are not added in order");
        table.push_back(page);
    }
}

void World::take_row(std::span<const int32_t> words, std::span<const int32_t> tokens,
                     Flight& flight) {
    Row row{.life = nullptr,
            .slot = words[kRowSlot],
            .start = words[kRowStart],
            .num_tokens = words[kRowNumTokens],
            .sample = (words[kRowFlags] & kRowSample) != 0,
            .prefill = (words[kRowFlags] & kRowPrefill) != 0,
            .pages = {}};
    demand(row.slot >= 0 && row.slot < static_cast<int>(owner_.size()), "a row without a slot");
    row.life = owner_[row.slot];
    demand(row.life != nullptr, "K15: a row for a slot that is not bound");
    Life& life = *row.life;
    if (life.next < 0 && life.resumed_at < 0) life.resumed_at = row.start;
    const auto& table = tables_[row.slot];
    demand(pages_for(row.end()) <= static_cast<int>(table.size()), "I13: a row without a page");
    row.pages.assign(table.begin(), table.begin() + pages_for(row.end()));
    const int offset = words[kRowTokenOffset];
    demand(words[kRowNumDraft] == 0 && offset >= 0 && row.num_tokens > 0 &&
               offset + row.num_tokens <= std::ssize(tokens),
           "a row's tokens are out of range");
    if (check_) {
        check_shape(row, words[kRowFlags]);
        check_tokens(row, tokens.subspan(offset, row.num_tokens));
        check_reads(row);
        check_disjoint(row);
    }
    life.next = row.end();
    life.sampled |= row.sample;
    flight.rows.push_back(std::move(row));
}

void World::check_shape(const Row& row, int32_t flags) const {
    const Life& life = *row.life;
    const Spec& spec = spec_of(life);
    demand(life.live, "I7: a row for a request that is over");
    const Request* request = scheduler_->find(id_of(life.client));
    const Holdings* held = request == nullptr ? nullptr : holdings(request->state);
    demand(held != nullptr && held->slot.id() == row.slot, "K15: the slot is another request's");
    const int known = static_cast<int>(life.tokens.size());
    const bool has_output = life.tokens.size() > spec.prompt.size();
    const bool reads = spec.read_cache && !(spec.prompt_logprobs && !has_output);
    if (life.next >= 0) {
        demand(row.start == life.next, "a row does not follow the one before");
    } else {
        demand(row.start % page_size_ == 0 && row.start < known, "resumes at a wrong boundary");
        demand(row.start == 0 || reads, "I10: the cache is read against the client's wish");
    }
    demand(row.end() < limit(life), "computes a token that nobody needs");
    demand(row.sample == (row.end() >= known), "samples at the wrong row");
    demand(((flags & kRowPrefill) != 0) == !life.sampled, "the prefill flag is wrong");
    const bool logprobs = !life.sampled && spec.prompt_logprobs && !has_output;
    demand(((flags & kRowPromptLogprobs) != 0) == logprobs, "prompt logprobs at the wrong row");
}

void World::check_tokens(const Row& row, std::span<const int32_t> tokens) const {
    const Life& life = *row.life;
    const int known = static_cast<int>(life.tokens.size());
    for (int i = 0; i < row.num_tokens; ++i) {
        const int position = row.start + i;
        if (position < known) {
            demand(tokens[i] == life.tokens[position], "a row computes a wrong token");
            continue;
        }
        demand(tokens[i] == kTokenFromDevice && row.num_tokens == 1, "a token nobody knows yet");
        demand(scenario_.options.overlap_depth > 0, "M1: no step reads tokens on the device");
        const bool sampling = std::ranges::any_of(flights_, [&](const Flight& flight) {
            return std::ranges::any_of(flight.rows, [&](const Row& other) {
                return other.life == row.life && other.sample && other.end() == position;
            });
        });
        demand(sampling, "no step in flight samples the token that a row wants");
    }
}

// Positions before the row: committed content of exactly this prefix, then the request's own rows
// in flight, on the same pages.
void World::check_reads(const Row& row) const {
    const Life& life = *row.life;
    int committed = row.start;
    for (const Flight& flight : flights_) {
        for (const Row& other : flight.rows) {
            if (other.life != row.life) continue;
            committed = std::min(committed, other.start);
            demand(std::ranges::equal(other.pages, std::span(row.pages).first(other.pages.size())),
                   "pages change under a step in flight");
        }
    }
    Prefix prefix = root_of(life);
    for (int position = 0; position < committed; ++position) {
        prefix = trie_.child(prefix, life.device_tokens[position]);
        const Cell& at = cell(row.pages[position / page_size_], position);
        demand(at.prefix != kUnwritten, "I3: a row reads what no committed step wrote");
        demand(at.prefix == prefix, "I4: a row reads foreign content");
        demand(!at.poison, "K5: a row reads what a failed row wrote");
    }
}

// I13: a page that is written is this row's alone; I2: no step in flight of another uses it.
void World::check_writes(const Row& row, const Flight& flight) const {
    const Inspector inspect(*scheduler_);
    for (int i = row.start / page_size_; i < pages_for(row.end()); ++i) {
        const PageId page = row.pages[i];
        demand(!inspect.is_published(page), "I13: writes a published page");
        demand(std::ranges::count(row.pages, page) == 1, "I13: one page at two places");
        for (int slot = 0; slot < static_cast<int>(owner_.size()); ++slot) {
            if (slot == row.slot || owner_[slot] == nullptr) continue;
            demand(std::ranges::count(tables_[slot], page) == 0, "I13: writes another's page");
        }
        for (const Flight& earlier : flights_) {
            for (const Row& other : earlier.rows) {
                if (other.life == row.life) continue;
                demand(std::ranges::count(other.pages, page) == 0, "K2: reused while in flight");
            }
        }
    }
    demand(std::ranges::count(flight.rows, row.slot, &Row::slot) == 1, "I13: a slot has two rows");
}

// M1: without overlap, steps in flight share no request but for the chunks of one prompt.
void World::check_disjoint(const Row& row) const {
    if (scenario_.options.overlap_depth > 0) return;
    for (const Flight& flight : flights_) {
        for (const Row& other : flight.rows) {
            const bool chunks = !other.sample && row.prefill;
            demand(other.life != row.life || chunks, "M1: one request in two steps at once");
        }
    }
}

// M2: a step takes its share of the decoding requests and of the token budget.
void World::check_budget(const Flight& flight) const {
    const int steps = scenario_.options.num_micro_steps;
    int num_tokens = 0, num_decodes = 0;
    for (const Row& row : flight.rows) {
        num_tokens += row.num_tokens;
        num_decodes += !row.prefill;
    }
    demand(!flight.rows.empty(), "a plan without rows");
    demand((num_tokens - 1) * steps < scenario_.options.max_num_batched_tokens,
           "M2: over the token budget");
    demand((num_decodes - 1) * steps < num_decoding_, "M2: more than a share of the decodes");
}

// Requests that decode, in a step in flight or not, and do not end with it.
int World::num_decoding() const {
    return static_cast<int>(std::ranges::count_if(clients_, [&](const LifeOf& life) {
        return life && life->live && life->slot >= 0 && life->sampled &&
               life->next + 1 < limit(*life);
    }));
}

void World::count(const Flight& flight) {
    coverage_.micro_steps += scenario_.options.num_micro_steps > 1 && !flights_.empty();
    for (const Row& row : flight.rows) {
        const Life& life = *row.life;
        coverage_.chunks_in_flight += row.prefill && in_flight(life);
        coverage_.chunks += row.end() < static_cast<int>(life.tokens.size());
        const bool first = row.start > 0 && life.resumed_at == row.start;
        coverage_.hits += first;
        coverage_.decoded_hits +=
            first && cell(row.pages[(row.start - 1) / page_size_], row.start - 1).sampled;
        const Request* request = scheduler_->find(id_of(life.client));
        coverage_.firm += holdings(request->state)->promise.firm();
    }
    for (const LifeOf& life : clients_) {
        const Request* request =
            life && life->live ? scheduler_->find(id_of(life->client)) : nullptr;
        coverage_.held_back += request != nullptr && request->twin_pages > 0;
        if (request == nullptr || holdings(request->state) != nullptr) continue;
        for (const Row& row : flight.rows) {
            const Request* other = scheduler_->find(id_of(row.life->client));
            coverage_.overtaken += row.life->next == row.end() &&
                                   other->arrival > request->arrival &&
                                   other->user != request->user && request->retractions == 0;
        }
    }
}

void World::check_state() const {
    const std::string broken = scheduler_->broken_invariant();
    if (!broken.empty()) throw Violation(broken);
    const Inspector inspect(*scheduler_);
    int num_live = 0;
    for (int i = 0; i < static_cast<int>(clients_.size()); ++i) {
        num_live += live(i);
        demand((scheduler_->find(id_of(i)) != nullptr) == live(i), "I7: who is live is not agreed");
    }
    for (const Flight& flight : flights_) {
        for (const Row& row : flight.rows) {
            for (PageId page : row.pages) {
                demand(!inspect.is_free_or_kept(page), "K2: a page in flight has no owner");
            }
        }
    }
    for (PageId page = 0; page < scenario_.options.num_pages; ++page) {
        if (!inspect.is_published(page)) continue;
        for (int offset = 0; offset < page_size_; ++offset) {
            demand(cell(page, offset).prefix != kUnwritten, "I3: published before it was written");
            demand(!cell(page, offset).poison, "K5: what a failed row wrote is published");
        }
        const Prefix prefix = cell(page, page_size_ - 1).prefix;
        demand(trie_.length(prefix) % page_size_ == 0 &&
                   trie_.key(prefix, inspect.index(), page_size_) == inspect.hash(page),
               "I4: a published page holds other content than its key says");
    }
    const Stats stats = scheduler_->stats();
    demand(stats.num_running + stats.num_waiting == num_live, "live requests are miscounted");
    demand(scheduler_->num_in_flight() == num_in_flight(), "steps in flight are miscounted");
    demand(scheduler_->has_work() || quiet(), "I8: work is forgotten");
    if (!quiet()) return;
    demand(!scheduler_->has_work(), "I8: idle, yet there is work");
    demand(stats.num_free_pages + stats.num_cached_pages == stats.num_pages, "I8: a page is lost");
}

// I12: what is refused changes nothing.
void World::check_rejections() const {
    const uint64_t before = hash();
    const auto throws = [](auto&& act) {
        try {
            act();
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    for (int i = 0; i < static_cast<int>(clients_.size()); ++i) {
        if (live(i)) {
            demand(throws([&] { scheduler_->submit(request(i)); }), "I12: a taken id is accepted");
        } else {
            demand(!scheduler_->abort(id_of(i)), "I7: aborts a request that is not live");
        }
    }
    NewRequest huge = request(0);
    huge.id = 77;
    huge.max_tokens = scenario_.options.max_model_len;
    const std::vector<int32_t> prompt(scenario_.options.max_model_len - 1, 1);
    huge.prompt = prompt;
    const int needed = pages_for(scenario_.options.max_model_len - 1);
    if (needed > scenario_.options.num_pages) {
        demand(throws([&] { scheduler_->submit(huge); }), "what can never fit is accepted");
    }
    check_match();
    if (num_in_flight() == scheduler_->max_in_flight()) {
        demand(throws([&] { scheduler_->next_plan(); }), "I12: plans beyond the depth");
    }
    if (flights_.empty()) {
        const Flight none{.header = {static_cast<int32_t>(next_step_) - 1, 0}, .rows = {}};
        refuses(result(none, 0), "I7: a duplicate completion is accepted");
    } else {
        const std::vector<int32_t> good = result(flights_.front(), 0);
        for (size_t i = 0; i < good.size(); ++i) {
            if (i == kResultHeaderWords - 1) continue;  // a spare word
            std::vector<int32_t> bad = good;
            bad[i] = -7;
            refuses(bad, "I12: a damaged result is accepted");
        }
        refuses({good.begin(), good.end() - 1}, "I12: a short result is accepted");
        if (num_in_flight() > 1) refuses(result(flights_[1], 0), "I12: a later step is accepted");
    }
    demand(hash() == before, "I12: a refusal changed the state");
}

// `match_prefix` finds the longest run of published pages, and never the last token.
void World::check_match() const {
    const Inspector inspect(*scheduler_);
    for (int i = 0; i < static_cast<int>(clients_.size()); ++i) {
        const Spec& spec = scenario_.specs[i];
        int expected = 0;
        Prefix prefix = trie_.root(spec.salt);
        for (int at = 0; at + 1 < std::ssize(spec.prompt); ++at) {
            prefix = trie_.child(prefix, spec.prompt[at]);
            if ((at + 1) % page_size_ != 0) continue;
            if (!inspect.finds(trie_.key(prefix, inspect.index(), page_size_))) break;
            expected = at + 1;
        }
        const int32_t found = scheduler_->match_prefix(spec.prompt, spec.salt);
        demand(found == expected, "match_prefix tells a wrong length");
        coverage_.foretold += found > 0;
    }
}

void World::refuses(const std::vector<int32_t>& result, const char* what) const {
    try {
        scheduler_->commit(result);
    } catch (const std::invalid_argument&) {
        return;
    }
    throw Violation(what);
}

}  // namespace tokenspeed
