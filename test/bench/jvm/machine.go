package main

import (
	"fmt"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// machineFacts are what the figures depend on. A start of a container is some ten
// starts of processes, and filling memory is the first touch of its pages: where the
// processor does not translate addresses by itself, as in some virtual machines, both
// take many times as long as elsewhere.
type machineFacts struct {
	CPUs        int    `json:"cpus"`
	MemoryBytes int64  `json:"memoryBytes"`
	Kernel      string `json:"kernel"`
	// TouchMicros is how long the first write to a page of anonymous memory takes.
	TouchMicros float64 `json:"touchPageMicros"`
	// CopyRate is that of one thread into memory that nobody has touched.
	CopyRate float64 `json:"copyBytesPerSecond"`
	// ProcessMs is how long /bin/true takes.
	ProcessMs float64 `json:"processMs"`
}

const (
	touchBytes   = 128 << 20
	processCount = 20
)

// measure finds out the costs.
func (m *machineFacts) measure() error {
	fresh := func() ([]byte, error) {
		b, err := unix.Mmap(-1, 0, touchBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil, fmt.Errorf("memory to touch: %w", err)
		}
		return b, unix.Madvise(b, unix.MADV_NOHUGEPAGE)
	}
	source, err := fresh()
	if err != nil {
		return err
	}
	defer unix.Munmap(source)
	begin := time.Now()
	for i := 0; i < len(source); i += unix.Getpagesize() {
		source[i] = 1
	}
	m.TouchMicros = float64(time.Since(begin).Nanoseconds()) / 1e3 / float64(len(source)/unix.Getpagesize())
	to, err := fresh()
	if err != nil {
		return err
	}
	defer unix.Munmap(to)
	begin = time.Now()
	copy(to, source)
	m.CopyRate = float64(len(to)) / time.Since(begin).Seconds()
	var took []float64
	for range processCount {
		begin := time.Now()
		if err := exec.Command("/bin/true").Run(); err != nil {
			return err
		}
		took = append(took, ms(time.Since(begin)))
	}
	m.ProcessMs = median(took)
	return nil
}
