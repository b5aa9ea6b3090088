// SPDX-License-Identifier: MIT
// A request's life as types. Each state owns what it needs; leaving the state gives it back.
//
//              Admit            Prefilled
//   Waiting ---------> Prefilling ------> Decoding
//      |                 ^ |    \          /  |
//      |           Admit | | Retract      /   |  End, Abort
//      |              Retracted <--------'    v
//      | Abort           | Abort          Draining --Drained--> Finished
//      '-----------------'---------------------------------------^
//
// End and Abort lead to Draining while a step in flight still holds a lease on the slot, else to
// Finished. There is one overload of `on` per legal transition and no other way to change a state;
// every other pair of state and event is listed as ignored or rejected, and the lists are proven
// complete and disjoint when this file compiles.
#pragma once

#include <concepts>
#include <type_traits>
#include <utility>
#include <variant>

#include "scheduler/pages.h"

namespace tokenspeed {

enum class Finish : int32_t { kNone = 0, kStop = 1, kLength = 2, kError = 3 };

// What a running request owns. The slot dies first and checks that no step still needs the rest.
//
//   0            settled             scheduled
//   |--committed--|--in flight---------|--not planned yet-->
//
// A row in flight that verifies drafts covers them too; when it commits, `scheduled` goes back to
// what is settled. Pages that only its rejected drafts wanted stay until somebody needs them.
struct Holdings {
    Holdings(Promise promise_in, PageList pages_in, Slot slot_in, int32_t resumed_at)
        : promise(std::move(promise_in)),
          pages(std::move(pages_in)),
          slot(std::move(slot_in)),
          settled(resumed_at),
          scheduled(resumed_at) {}
    Promise promise;
    PageList pages;
    Slot slot;
    int32_t settled;     // positions written by a committed step, with tokens known for good
    int32_t scheduled;   // positions that a plan covers
    bool alone = false;  // its last row in flight speculates: none may follow before it commits
};

struct MoveOnly {
    MoveOnly() = default;
    MoveOnly(MoveOnly&&) noexcept = default;
    MoveOnly& operator=(MoveOnly&&) noexcept = default;
};

struct Waiting : MoveOnly {};
struct Prefilling {
    explicit Prefilling(Holdings held_in) : held(std::move(held_in)) {}
    Holdings held;
};
struct Decoding {  // each further row is the one position `scheduled`
    explicit Decoding(Holdings held_in) : held(std::move(held_in)) {}
    Holdings held;
};
struct Retracted : MoveOnly {};
struct Draining {
    explicit Draining(Holdings held_in) : held(std::move(held_in)) {}
    Holdings held;
};
struct Finished : MoveOnly {};

struct Submit {};  // a second request with this one's id
struct Admit {
    Holdings held;
};
struct Prefilled {};  // the row that covers all known tokens is planned
struct Retract {};
struct End {};  // a stop id, the length, or a failed row
struct Abort {};
struct Drained {};  // the last lease is back

using Ended = std::variant<Draining, Finished>;

inline Ended end(Holdings held) {
    if (mutant(Mutant::kK2PagesGoUnderStep)) PageList gone(std::move(held.pages));
    if (mutant(Mutant::kK2EndIgnoresLease)) return Finished{};
    if (held.slot.leased()) return Draining(std::move(held));
    return Finished{};
}

inline Prefilling on(Waiting, Admit event) { return Prefilling(std::move(event.held)); }
inline Prefilling on(Retracted, Admit event) { return Prefilling(std::move(event.held)); }
inline Decoding on(Prefilling state, Prefilled) { return Decoding(std::move(state.held)); }
inline Retracted on(Prefilling, Retract) { return {}; }
inline Retracted on(Decoding, Retract) { return {}; }
inline Ended on(Prefilling state, End) { return end(std::move(state.held)); }
inline Ended on(Decoding state, End) { return end(std::move(state.held)); }
inline Finished on(Waiting, Abort) { return {}; }
inline Finished on(Retracted, Abort) { return {}; }
inline Ended on(Prefilling state, Abort) { return end(std::move(state.held)); }
inline Ended on(Decoding state, Abort) { return end(std::move(state.held)); }
inline Finished on(Draining, Drained) { return {}; }

template <class S, class E>
concept Moves = requires(S state, E event) { on(std::move(state), std::move(event)); };

template <class... T>
struct Types {};
template <class S, class E>
struct Pair {};
template <class P, class List>
inline constexpr bool kListed = false;
template <class P, class... L>
inline constexpr bool kListed<P, Types<L...>> = (std::same_as<P, L> || ...);

// The id is taken.
using Rejected = Types<Pair<Waiting, Submit>, Pair<Prefilling, Submit>, Pair<Decoding, Submit>,
                       Pair<Retracted, Submit>>;

// Too late, or nothing to do: the event is dropped, and what it carries goes back.
using IgnoredLate =
    Types<Pair<Draining, Submit>, Pair<Finished, Submit>,  // the id is free again
          Pair<Prefilling, Admit>, Pair<Decoding, Admit>, Pair<Draining, Admit>,
          Pair<Finished, Admit>, Pair<Waiting, Prefilled>, Pair<Decoding, Prefilled>,
          Pair<Retracted, Prefilled>, Pair<Draining, Prefilled>, Pair<Finished, Prefilled>,
          Pair<Waiting, Retract>, Pair<Retracted, Retract>, Pair<Draining, Retract>,
          Pair<Finished, Retract>, Pair<Waiting, End>, Pair<Retracted, End>, Pair<Draining, End>,
          Pair<Finished, End>, Pair<Draining, Abort>, Pair<Finished, Abort>, Pair<Waiting, Drained>,
          Pair<Prefilling, Drained>, Pair<Decoding, Drained>, Pair<Retracted, Drained>,
          Pair<Finished, Drained>>;

template <class S, class E>
inline constexpr int kVerdicts =
    Moves<S, E> + kListed<Pair<S, E>, Rejected> + kListed<Pair<S, E>, IgnoredLate>;

template <class E, class... S>
constexpr bool total(Types<S...>) {
    return ((kVerdicts<S, E> == 1) && ...);
}
template <class... E>
constexpr bool total_over(Types<E...>) {
    using States = Types<Waiting, Prefilling, Decoding, Retracted, Draining, Finished>;
    return (total<E>(States{}) && ...);
}
static_assert(total_over(Types<Submit, Admit, Prefilled, Retract, End, Abort, Drained>{}),
              "each pair of state and event is exactly one of moved, ignored, rejected");

using State = std::variant<Waiting, Prefilling, Decoding, Retracted, Draining, Finished>;
enum class Verdict { kMoved, kIgnored, kRejected };

inline void enter(State& state, Ended ended) {
    std::visit([&](auto&& s) { state.emplace<std::decay_t<decltype(s)>>(std::move(s)); },
               std::move(ended));
}
template <class S>
void enter(State& state, S next) {
    state.emplace<S>(std::move(next));
}

template <class E>
Verdict apply(State& state, E event) {
    return std::visit(
        [&]<class S>(S& now) {
            if constexpr (Moves<S, E>) {
                enter(state, on(std::move(now), std::move(event)));
                return Verdict::kMoved;
            } else if constexpr (kListed<Pair<S, E>, Rejected>) {
                return Verdict::kRejected;
            } else {
                return Verdict::kIgnored;
            }
        },
        state);
}

inline Holdings* holdings(State& state) {
    if (auto* decoding = std::get_if<Decoding>(&state)) return &decoding->held;
    if (auto* prefilling = std::get_if<Prefilling>(&state)) return &prefilling->held;
    if (auto* draining = std::get_if<Draining>(&state)) return &draining->held;
    return nullptr;
}
inline const Holdings* holdings(const State& state) { return holdings(const_cast<State&>(state)); }

// What must not compile.
template <class S>
concept CanFinish = Moves<S, End>;
template <class P>
concept CanBeSealed =
    requires(PagePool pool, P page, Settled proof) { pool.seal(std::move(page), proof); };
template <class Proof>
concept CanSeal =
    requires(PagePool pool, WritablePage page, Proof proof) { pool.seal(std::move(page), proof); };
template <class P>
concept CanBeShared = requires(const P page) { page.share(); };
template <class P>
concept CanBeWritten = requires(PageList list, P page) { list.append(std::move(page)); };
static_assert(!CanFinish<Waiting> && !CanFinish<Retracted> && !CanFinish<Finished>);
static_assert(!Moves<Waiting, Retract> && !Moves<Finished, Admit> && !Moves<Draining, Retract>);
static_assert(CanBeSealed<WritablePage> && !CanBeSealed<FreePage> && !CanBeSealed<SealedPage>);
static_assert(CanBeShared<SealedPage> && !CanBeShared<WritablePage> && !CanBeShared<FreePage>);
static_assert(CanBeWritten<WritablePage> && !CanBeWritten<SealedPage> && !CanBeWritten<FreePage>);
static_assert(!std::copy_constructible<FreePage> && !std::copy_constructible<WritablePage> &&
              !std::copy_constructible<SealedPage> && !std::copy_constructible<Lease> &&
              !std::copy_constructible<Slot> && !std::copy_constructible<State>);
static_assert(!std::constructible_from<Committed, int32_t>, "only a committed step proves a write");
static_assert(CanSeal<Settled> && !CanSeal<Committed> && !CanSeal<int32_t> &&
                  !std::constructible_from<Settled, int32_t>,
              "a computed position may hold a rejected draft");

}  // namespace tokenspeed
