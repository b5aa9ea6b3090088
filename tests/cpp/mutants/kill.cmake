# SPDX-License-Identifier: MIT
# Builds an explorer with one defect and lets it explore; fails if the defect is not found.
execute_process(COMMAND "${CMAKE_COMMAND}" --build "${BUILD}" --target "${MUTANT}"
    RESULT_VARIABLE failed OUTPUT_VARIABLE log ERROR_VARIABLE log)
if(failed)
    message(FATAL_ERROR "${MUTANT} does not build:\n${log}")
endif()
foreach(bound quick full)
    execute_process(COMMAND "${BINARY}" ${bound} RESULT_VARIABLE code OUTPUT_VARIABLE found
        ERROR_VARIABLE said)
    if(NOT code STREQUAL "0" AND found MATCHES "VIOLATION[^\n]*")
        message(STATUS "${MUTANT} is killed (${bound}): ${CMAKE_MATCH_0} ${said}")
        return()
    endif()
    if(NOT code STREQUAL "0")
        message(FATAL_ERROR "${MUTANT} ended with ${code} and named no violation:\n${found}${said}")
    endif()
endforeach()
message(FATAL_ERROR "${MUTANT} survives")
