// SPDX-License-Identifier: MIT
// Known ways to break the scheduler, to test its tests. A build with -DTS_MUTANT=kName has that one
// defect, and the exploration must find it (tests/cpp/mutants.cmake). Every other build has none:
// `mutant` is false at compile time. K.., I.., M.., R.. and S.. are the classes of
// docs/scheduler.md.
#pragma once

namespace tokenspeed {

enum class Mutant {
    kNone,
    kK2PagesGoUnderStep,     // a request that ends gives its pages back though a step reads them
    kK2EndIgnoresLease,      // ... and its slot
    kK2LeaseDropped,         // a planned row holds no lease
    kK2RetractInFlight,      // a victim is retracted while its step is in flight
    kK3CountsPlanned,        // what is planned counts as computed
    kK3CountsSampled,        // the last sampled token counts as computed
    kK3ResumesAtEnd,         // a full hit leaves nothing to compute
    kK4MoveCopies,           // a moved handle still gives its page back
    kK4ShareNotCounted,      // a second user is not counted
    kK4KeptAndFreed,         // a kept page is put on the free list too
    kK4VictimStays,          // an evicted page stays in the order of eviction
    kK5PublishAtPlan,        // pages are published when planned
    kK5PublishOnAbort,       // abort publishes what a step is still writing
    kK5PublishAfterFailure,  // a failed row's pages stay findable
    kK11HitsLeak,            // an admission that finds no room keeps the pages that it hit
    kK11PromiseLeak,         // a promise is never taken back
    kK11DrainedStays,        // a drained request is kept
    kK12NoAgeing,            // a request may be retracted for ever
    kK12RoomUnnoticed,       // a request that did not fit is not asked again
    kK15BindDropped,         // a request that is admitted again is not bound
    kK15BindForgets,         // ... is bound without its output
    kK15TableNotSent,        // the pages of a hit are not sent to the slot's table
    kI10SaltIgnored,         // requests of different salts share pages
    kM1PlannedTwice,         // a request is in two micro-steps at once
    kM1CommitOutOfOrder,     // a later step may commit before the oldest one
    kM2Uneven,               // a micro-step takes every decoding request that it finds
    kR1BudgetIgnored,        // marks beyond the share stay
    kR2MarkOutlivesPage,     // a page that was taken is still marked
    kR3MarksHoldBack,        // what is marked does not count as available
    kR4PromiseBeyondBudget,  // a receipt promises what the share does not allow
    kR5ReceiptTwice,         // a request is told again what was found for it
    kK3CountsRejected,       // one rejected draft counts as settled
    kK3KeepsScheduled,       // rejected drafts stay scheduled
    kK5PublishRejected,      // a page whose last place holds a rejected draft is published
    kM1SpeculatesTwice,      // a step follows a row in flight that speculates
    kS1DraftRetracts,        // a draft without a page retracts somebody
    kS1TakesPromised,        // a draft takes a page that was promised to others
    kS1ReclaimsInFlight,     // pages go from a request whose drafts are being verified
    kS1PromptsStarve,        // drafts use up what prompts wait for
    kS1BeyondLimit,          // a draft goes on behind the limit
    kS2StopIgnored,          // a stop id among accepted drafts does not end the request
};

#ifndef TS_MUTANT
#define TS_MUTANT kNone
#endif

constexpr bool mutant(Mutant which) { return which == Mutant::TS_MUTANT; }

}  // namespace tokenspeed
