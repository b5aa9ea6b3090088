// SPDX-License-Identifier: MIT
// Speculation in the explored worlds: what a device accepts of a draft, and what a plan may do with
// one. The model of a request's ids is the same with drafts and without: an outcome says what is
// sampled at each place, whatever the drafts are.
#include <algorithm>

#include "explore_world.h"

namespace tokenspeed {

void World::speculate(int client, const Guess& guess) {
    Life& life = *clients_[client];
    life.draft.clear();
    for (int i = 0; i < guess.num_draft; ++i) {
        const int position = static_cast<int>(life.tokens.size()) + i;
        life.draft.push_back(guess.stops && i == 0 ? kStopId : kFirstOutput + position);
    }
    life.num_propose = guess.num_propose;
    demand(scheduler_->speculate(id_of(client), life.draft, life.num_propose),
           "I7: a live request cannot speculate");
}

// The ids that a row accepts: each place's sample, as long as the draft says the same.
std::vector<int32_t> World::sampled(const Row& row, Move::Outcome outcome) const {
    std::vector<int32_t> ids;
    if (!row.sample || outcome == Move::kFail) return ids;
    for (int place = 0;; ++place) {
        const bool stops = place == static_cast<int>(outcome) - Move::kStop;
        ids.push_back(stops ? kStopId : kFirstOutput + row.firm_end() + place);
        const bool more = place < static_cast<int>(row.draft.size());
        if (!more || row.draft[place] != ids.back() || outcome == Move::kShort) return ids;
    }
}

// All that a row may come to, but for plain kToken: what would look the same is left out.
std::vector<Move::Outcome> World::outcomes_of(const Row& row) const {
    std::vector<Move::Outcome> all;
    const auto reached = [&](int outcome) {
        const auto ids = sampled(row, static_cast<Move::Outcome>(outcome));
        return std::ssize(ids) > outcome - Move::kStop;
    };
    if (row.life->live && row.sample) {
        for (int at = Move::kStop; at <= Move::kStop + std::ssize(row.draft); ++at) {
            if (reached(at)) all.push_back(static_cast<Move::Outcome>(at));
        }
        if (sampled(row, Move::kToken).size() > 1) all.push_back(Move::kShort);
    }
    all.push_back(Move::kFail);
    return all;
}

// The client's view: ids one by one, up to a stop id or the limit. A draft that waits goes on.
Finish World::take(Life& life, std::vector<int32_t>& ids) const {
    const Spec& spec = spec_of(life);
    for (size_t i = 0; i < ids.size(); ++i) {
        life.tokens.push_back(ids[i]);
        if (!life.draft.empty() && life.draft.front() == ids[i]) {
            life.draft.erase(life.draft.begin());
        } else {
            life.draft.clear();
        }
        const int outputs = static_cast<int>(life.tokens.size() - spec.prompt.size());
        const bool stops = ids[i] == kStopId && outputs >= spec.min_tokens;
        if (!stops && static_cast<int>(life.tokens.size()) < limit(life)) continue;
        ids.resize(i + 1);
        return stops ? Finish::kStop : Finish::kLength;
    }
    return Finish::kNone;
}

// A row verifies the beginning of what was told, behind one known token; the last row of a prompt
// verifies nothing.
void World::check_draft(const Row& row) const {
    const Life& life = *row.life;
    const auto count = row.draft.size();
    demand(
        count == 0 || (row.sample && !row.prefill && row.num_tokens == 1 + std::ssize(row.draft)),
        "drafts in a row that cannot verify them");
    demand(count <= life.draft.size() &&
               std::equal(row.draft.begin(), row.draft.end(), life.draft.begin()),
           "verifies what nobody told");
    const int most = std::max(0, limit(life) - static_cast<int>(life.tokens.size()) - 2);
    demand(row.num_propose == (row.sample ? std::min(life.num_propose, most) : 0),
           "proposes another number than it was told");
    const bool known = row.start < static_cast<int>(life.tokens.size());
    demand(known || !row.speculates(), "speculates behind a token that nobody knows");
    coverage_.cut += !row.prefill && count < life.draft.size();
}

// Planning the row that samples uses up what was told.
void World::forget_guess(const Row& row) {
    if (!row.sample) return;
    row.life->draft.clear();
    row.life->num_propose = 0;
}

// D1: nobody is retracted for a draft, nor while pages lie idle that only rejected drafts wanted.
void World::check_victims(const Flight& flight) const {
    if (num_victims_ == 0) return;
    const bool grows = std::ranges::any_of(flight.rows, [&](const Row& row) {
        return !row.prefill && fresh_.contains({row.slot, row.start / page_size_});
    });
    demand(grows || victim_grows_, "D1: retracted though no decoding request lacked a page");
    for (const LifeOf& life : clients_) {
        const Request* request =
            life && life->live ? scheduler_->find(id_of(life->client)) : nullptr;
        const Holdings* held = request == nullptr ? nullptr : holdings(request->state);
        if (held == nullptr || held->promise.firm()) continue;
        demand(held->pages.size() <= pages_for(held->scheduled),
               "D1: retracted though rejected drafts keep pages");
    }
}

// D1: when drafts took pages, what was promised to others is still there.
void World::check_draft_pages(const Flight& flight) const {
    for (const Row& row : flight.rows) {
        const Request* request = scheduler_->find(id_of(row.life->client));
        if (row.draft.empty() || holdings(request->state)->promise.firm()) continue;
        const int last = static_cast<int>(row.pages.size()) - 1;
        if (last < pages_for(row.firm_end()) || !fresh_.contains({row.slot, last})) continue;
        demand(Inspector(*scheduler_).num_unpromised() >= 0, "D1: drafts took promised pages");
    }
}

}  // namespace tokenspeed
