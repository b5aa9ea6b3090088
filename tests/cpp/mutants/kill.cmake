# SPDX-License-Identifier: MIT
# Builds an explorer with one defect and lets it explore; fails if the defect is not found. It must
# be found among the scenarios with micro-steps alone as well as among all; what only overlapping
# steps can show, among all.
execute_process(COMMAND "${CMAKE_COMMAND}" --build "${BUILD}" --target "${MUTANT}"
    RESULT_VARIABLE failed OUTPUT_VARIABLE log ERROR_VARIABLE log)
if(failed)
    message(FATAL_ERROR "${MUTANT} does not build:\n${log}")
endif()

# Runs the explorer with these arguments; sets `killed`.
function(try_to_kill)
    execute_process(COMMAND "${BINARY}" ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE found
        ERROR_VARIABLE said)
    set(killed FALSE PARENT_SCOPE)
    if(code STREQUAL "0")
        return()
    endif()
    if(NOT found MATCHES "VIOLATION[^\n]*")
        message(FATAL_ERROR "${MUTANT} ended with ${code} and named no violation:\n${found}${said}")
    endif()
    message(STATUS "${MUTANT} is killed (${ARGN}): ${CMAKE_MATCH_0} ${said}")
    set(killed TRUE PARENT_SCOPE)
endfunction()

foreach(scenarios "" "micro-steps")
    if(scenarios AND MUTANT MATCHES "SpeculatesTwice")
        break()
    endif()
    foreach(bound quick full)
        try_to_kill(${bound} ${scenarios})
        if(killed)
            break()
        endif()
    endforeach()
    if(NOT killed)
        message(FATAL_ERROR "${MUTANT} survives (${scenarios})")
    endif()
endforeach()
