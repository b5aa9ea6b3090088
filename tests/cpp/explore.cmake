# SPDX-License-Identifier: MIT
# Exploration of every interleaving within a bound, and what must not compile.
set(EXPLORE_SOURCES explore.cpp explore_check.cpp explore_draft.cpp explore_plan.cpp
    explore_world.cpp)

add_executable(explore_sanitized ${EXPLORE_SOURCES})
target_link_libraries(explore_sanitized PRIVATE ts_scheduler_sanitized ts_warnings)
add_test(NAME explore_quick COMMAND explore_sanitized quick)

# ts_explorer(name [definitions...]): an optimised explorer with a scheduler of its own, built when
# a test asks for it.
function(ts_explorer name)
    add_executable(${name} EXCLUDE_FROM_ALL ${EXPLORE_SOURCES} ${TS_SCHEDULER_SOURCES})
    target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
    target_compile_definitions(${name} PRIVATE ${ARGN})
    target_link_libraries(${name} PRIVATE ts_warnings)
    set_target_properties(${name} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
endfunction()

ts_explorer(explore)
target_compile_options(explore PRIVATE -O2)
add_test(NAME explore_build COMMAND "${CMAKE_COMMAND}" --build "${CMAKE_BINARY_DIR}" --target explore)
add_test(NAME explore_full COMMAND explore full)
set_tests_properties(explore_build PROPERTIES LABELS full FIXTURES_SETUP explore
    RESOURCE_LOCK build_tree)
set_tests_properties(explore_full PROPERTIES LABELS full FIXTURES_REQUIRED explore TIMEOUT 1200)

file(GLOB compile_fail_sources CONFIGURE_DEPENDS compile_fail/*.cpp)
foreach(source ${compile_fail_sources})
    get_filename_component(name "${source}" NAME_WE)
    add_test(NAME refuses_to_${name}
        COMMAND "${CMAKE_COMMAND}" "-DCXX=${CMAKE_CXX_COMPILER}" "-DSOURCE=${source}"
            "-DINCLUDE=${PROJECT_SOURCE_DIR}/csrc"
            -P "${CMAKE_CURRENT_SOURCE_DIR}/compile_fail/check.cmake")
endforeach()
