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
    prompts_wait_ = std::ranges::any_of(clients_, [](const LifeOf& life) {
        return life && life->live && (life->slot < 0 || !life->sampled);
    });
    num_victims_ = 0;
    victim_grows_ = false;
    fresh_.clear();
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
    demand_kind(words[kPlanHeaderOnlyDecodes], rows);
    Flight flight{.header = {words[kPlanHeaderStepLow], words[kPlanHeaderStepHigh]}, .rows = {}};
    for (size_t at = 0; at < rows.size(); at += kRowWords) {
        take_row(rows.subspan(at, kRowWords), tokens, flight);
    }
    if (check_) {
        for (const Row& row : flight.rows) check_writes(row, flight);
        check_budget(flight);
        check_victims(flight);
        check_draft_pages(flight);
        count(flight);
    }
    flights_.push_back(std::move(flight));
}

// Whether the header says what the rows are.
void World::demand_kind(int32_t only_decodes, std::span<const int32_t> rows) {
    bool expected = true;
    for (size_t at = 0; at < rows.size(); at += kRowWords) {
        const auto row = rows.subspan(at, kRowWords);
        expected &= row[kRowFlags] == kRowSample && row[kRowNumTokens] == 1 &&
                    row[kRowNumDraft] == 0 && row[kRowNumPropose] == 0;
    }
    demand(only_decodes == (expected ? 1 : 0), "the header does not say what the rows are");
}

// A request that was retracted inside next_plan has no slot any more.
void World::unbind_retracted() {
    for (const LifeOf& life : clients_) {
        if (!life || !life->live || life->slot < 0) continue;
        const Request* request = scheduler_->find(id_of(life->client));
        demand(request != nullptr, "I7: a live request is lost");
        if (request->retractions == life->retractions) continue;
        demand(!in_flight(*life), "I2: retracted while a step in flight uses its pages");
        ++num_victims_;
        victim_grows_ |= life->sampled && pages_for(life->next) < pages_for(life->next + 1);
        unbind(*life);
        life->draft.clear();
        life->num_propose = 0;
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
        // What only rejected drafts wanted may have gone back.
        const int needed = std::max(0, pages_for(owner_[slot]->next));
        demand(index >= needed && index <= static_cast<int>(table.size()),
               "pages are not added in order");
        coverage_.reclaimed += check_ && index < static_cast<int>(table.size());
        table.resize(index);
        table.push_back(page);
        fresh_.emplace(slot, index);
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
            .num_propose = words[kRowNumPropose]};
    demand(row.slot >= 0 && row.slot < static_cast<int>(owner_.size()), "a row without a slot");
    row.life = owner_[row.slot];
    demand(row.life != nullptr, "K15: a row for a slot that is not bound");
    Life& life = *row.life;
    if (life.next < 0 && life.resumed_at < 0) life.resumed_at = row.start;
    const auto& table = tables_[row.slot];
    demand(pages_for(row.end()) <= static_cast<int>(table.size()), "I13: a row without a page");
    row.pages.assign(table.begin(), table.begin() + pages_for(row.end()));
    const int offset = words[kRowTokenOffset];
    const int num_draft = words[kRowNumDraft];
    demand(num_draft >= 0 && offset >= 0 && row.num_tokens > num_draft &&
               offset + row.num_tokens <= std::ssize(tokens),
           "a row's tokens are out of range");
    const auto own = tokens.subspan(offset, row.num_tokens);
    row.draft.assign(own.end() - num_draft, own.end());
    if (check_) {
        check_shape(row, words[kRowFlags]);
        check_tokens(row, own.first(own.size() - num_draft));
        check_draft(row);
        check_reads(row);
        check_disjoint(row);
    }
    forget_guess(row);
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
    demand(row.sample == (row.firm_end() >= known), "samples at the wrong row");
    demand(((flags & kRowPrefill) != 0) == !life.sampled, "the prefill flag is wrong");
    const bool logprobs = !life.sampled && spec.prompt_logprobs && !has_output;
    demand(((flags & kRowPromptLogprobs) != 0) == logprobs, "prompt logprobs at the wrong row");
}

void World::check_tokens(const Row& row, std::span<const int32_t> tokens) const {
    const Life& life = *row.life;
    const int known = static_cast<int>(life.tokens.size());
    for (int i = 0; i < std::ssize(tokens); ++i) {
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
            const auto& table = tables_[slot];
            const int next = owner_[slot]->next;  // behind it may stand what went back since
            const auto end = next < 0
                                 ? table.end()
                                 : table.begin() + std::min<int>(table.size(), pages_for(next));
            demand(std::count(table.begin(), end, page) == 0, "I13: writes another's page");
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

// M1: steps in flight share no request but for the chunks of one prompt and, with overlap, rows
// that do not speculate.
void World::check_disjoint(const Row& row) const {
    for (const Flight& flight : flights_) {
        for (const Row& other : flight.rows) {
            const bool chunks = !other.sample && row.prefill;
            const bool plain =
                scenario_.options.overlap_depth > 0 && !row.speculates() && !other.speculates();
            demand(other.life != row.life || chunks || plain,
                   "M1: one request in two steps at once");
        }
    }
}

// M2: a step takes its share of the decoding requests and of the token budget.
void World::check_budget(const Flight& flight) const {
    const int steps = scenario_.options.num_micro_steps;
    int num_tokens = 0, num_decodes = 0, num_draft = 0;
    for (const Row& row : flight.rows) {
        num_tokens += row.num_tokens;
        num_decodes += !row.prefill;
        num_draft += static_cast<int>(row.draft.size());
    }
    const int budget = (scenario_.options.max_num_batched_tokens + steps - 1) / steps;
    demand(!prompts_wait_ || 2 * num_draft <= budget - num_decodes,
           "D1: drafts use up what prompts wait for");
    demand(!flight.rows.empty(), "a plan without rows");
    demand((num_tokens - 1) * steps < scenario_.options.max_num_batched_tokens,
           "M2: over the token budget");
    demand((num_decodes - 1) * steps < num_decoding_, "M2: more than a share of the decodes");
}

// Requests that decode, in a step in flight or not, and do not end with it.
int World::num_decoding() const {
    return static_cast<int>(std::ranges::count_if(clients_, [&](const LifeOf& life) {
        return life && life->live && life->slot >= 0 && life->sampled &&
               std::min<int>(life->next, life->tokens.size()) + 1 < limit(*life);
    }));
}

void World::count(const Flight& flight) {
    coverage_.micro_steps += scenario_.options.num_micro_steps > 1 && !flights_.empty();
    for (const Row& row : flight.rows) {
        const Life& life = *row.life;
        coverage_.drafts += !row.draft.empty();
        coverage_.proposing += row.num_propose > 0;
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

}  // namespace tokenspeed
