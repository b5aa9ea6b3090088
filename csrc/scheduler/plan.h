// SPDX-License-Identifier: MIT
// The flat layouts that cross between scheduler and execution: Plan (down) and StepResult (up).
// This file knows int32 words and nothing of requests, tensors or Python.
//
// Both are one array of int32. A Plan is broadcast to other ranks byte for byte. All sections stand
// one after the other without gaps, in the order below; counts come from the header.
//
//   Plan:   header [kPlanHeaderWords]
//           rows   [num_rows][kRowWords]        slot, flags, start, num_tokens, num_draft, offset,
//                                               num_propose
//           tokens [num_tokens]                 ids; kTokenFromDevice: the slot's last sampled id
//           deltas [num_deltas][kDeltaWords]    group, slot, index in the slot's page table, page
//           copies [num_copies][kCopyWords]     source tier, source page, target tier, target page
//           binds  [num_binds][kBindWords]      slot, request id low, high, number of known tokens
//
//   Result: header [kResultHeaderWords]
//           rows   [num_rows][kResultRowWords]  slot, status, num_accepted    (in plan order)
//           ids    [num_ids]                    accepted ids, ragged, in row order
//
// A row covers positions [start, start + num_tokens) of its slot's sequence. The last `num_draft`
// of its tokens are drafts: guesses at what will be sampled, and logits are wanted at its last
// 1 + num_draft places. Such a row accepts 1 .. 1 + num_draft ids: the drafts that are what would
// have been sampled anyway, and one more. After them a drafter on the device proposes `num_propose`
// ids. Execution applies, in
// this order: binds (the slot's sampler state is reset and rebuilt for that request), copies,
// deltas, then rows. A page table entry not named by a delta keeps its value.
#pragma once

#include <cstdint>

namespace tokenspeed {

inline constexpr int32_t kPlanMagic = 0x4C505354;    // "TSPL"
inline constexpr int32_t kResultMagic = 0x53525354;  // "TSRS"
inline constexpr int32_t kLayoutVersion = 3;

inline constexpr int kPlanHeaderWords = 16;
enum PlanHeader : int {
    kPlanHeaderMagic = 0,
    kPlanHeaderVersion = 1,
    kPlanHeaderTotalWords = 2,
    kPlanHeaderStepLow = 3,
    kPlanHeaderStepHigh = 4,
    kPlanHeaderNumRows = 5,
    kPlanHeaderNumTokens = 6,
    kPlanHeaderNumDeltas = 7,
    kPlanHeaderNumCopies = 8,
    kPlanHeaderNumBinds = 9,
    kPlanHeaderOnlyDecodes = 10,  // 1: each row samples after its one token, none proposes
};

inline constexpr int kRowWords = 7;
enum RowWord : int {
    kRowSlot,
    kRowFlags,
    kRowStart,
    kRowNumTokens,
    kRowNumDraft,
    kRowTokenOffset,
    kRowNumPropose,
};
enum RowFlag : int32_t {
    kRowSample = 1,          // logits of the last 1 + num_draft tokens are needed, ids are sampled
    kRowPromptLogprobs = 2,  // logits of all the row's tokens are needed
    kRowPrefill = 4,         // the row computes tokens that were known when it was planned
};
inline constexpr int32_t kTokenFromDevice = -1;
inline constexpr int kDeltaWords = 4;
inline constexpr int kCopyWords = 4;
inline constexpr int kBindWords = 4;

inline constexpr int kResultHeaderWords = 8;
enum ResultHeader : int {
    kResultHeaderMagic = 0,
    kResultHeaderVersion = 1,
    kResultHeaderTotalWords = 2,
    kResultHeaderStepLow = 3,
    kResultHeaderStepHigh = 4,
    kResultHeaderNumRows = 5,
    kResultHeaderNumIds = 6,
};
inline constexpr int kResultRowWords = 3;
enum ResultRowWord : int { kResultRowSlot, kResultRowStatus, kResultRowNumAccepted };
enum RowStatus : int32_t {
    kRowOk = 0,
    kRowFailed = 1,  // the row's numbers are not finite: this request fails, no other
};

}  // namespace tokenspeed
