# SPDX-License-Identifier: MIT
# One explorer for each defect that csrc/scheduler/mutant.h names; the exploration must find it.
file(STRINGS "${PROJECT_SOURCE_DIR}/csrc/scheduler/mutant.h" mutants REGEX "^ +k[KIMRS][0-9]+[A-Za-z]+,")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    "${PROJECT_SOURCE_DIR}/csrc/scheduler/mutant.h")
foreach(line ${mutants})
    string(REGEX MATCH "k[KIMRS][0-9]+[A-Za-z]+" name "${line}")
    ts_explorer(mutant_${name} TS_MUTANT=${name})
    target_compile_options(mutant_${name} PRIVATE -O1)
    add_test(NAME mutant_${name}
        COMMAND "${CMAKE_COMMAND}" "-DBUILD=${CMAKE_BINARY_DIR}" "-DMUTANT=mutant_${name}"
            "-DBINARY=$<TARGET_FILE:mutant_${name}>"
            -P "${CMAKE_CURRENT_SOURCE_DIR}/mutants/kill.cmake")
    set_tests_properties(mutant_${name} PROPERTIES LABELS full TIMEOUT 1200
        RESOURCE_LOCK build_tree)
endforeach()
