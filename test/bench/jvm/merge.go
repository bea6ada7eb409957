package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ksmDir has the kernel's settings of the merging of pages (KSM), and its counts:
// Documentation/admin-guide/mm/ksm.rst.
const ksmDir = "/sys/kernel/mm/ksm"

// mergeTimeout bounds how long equal pages are waited for to be merged.
const mergeTimeout = 2 * time.Minute

// setting is one of the kernel's settings of KSM.
type setting struct{ name, value string }

// mergeFast has the kernel merge pages, as fast as one processor can. These are
// settings of the whole machine, this node's or not: putBack makes them what they
// were, and must be called.
func mergeFast(dir string) (putBack func() error, err error) {
	wanted := []setting{{"advisor_mode", "none"}, {"pages_to_scan", "20000"}, {"sleep_millisecs", "10"}, {"run", "1"}}
	var before []setting // the last to be put back first
	for i, s := range wanted {
		b, err := os.ReadFile(filepath.Join(dir, s.name))
		if errors.Is(err, fs.ErrNotExist) && s.name == "advisor_mode" {
			wanted[i].name = "" // Linux 6.8 has it
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("merging: %w", err)
		}
		value := strings.TrimSpace(string(b))
		if _, rest, ok := strings.Cut(value, "["); ok { // the one of several that is chosen
			value, _, _ = strings.Cut(rest, "]")
		}
		before = append([]setting{{s.name, value}}, before...)
	}
	write := func(settings []setting) error {
		var errs []error
		for _, s := range settings {
			if s.name != "" {
				errs = append(errs, os.WriteFile(filepath.Join(dir, s.name), []byte(s.value), 0))
			}
		}
		return errors.Join(errs...)
	}
	putBack = func() error {
		if err := write(before); err != nil {
			return fmt.Errorf("put back the settings of %s: %w", dir, err)
		}
		return nil
	}
	if err := write(wanted); err != nil {
		return nil, errors.Join(fmt.Errorf("merging: %w", err), putBack())
	}
	return putBack, nil
}

// count reads one of KSM's counts.
func count(dir, name string) (int64, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// waitMerged waits until hardly more pages are merged than some seconds before,
// after all of them have been looked at twice, or the time is over.
func waitMerged(ctx context.Context, dir string, timeout, poll time.Duration) (settled bool, err error) {
	first, err := count(dir, "full_scans")
	if err != nil {
		return false, err
	}
	const back = 5
	var sharing []int64
	for end := time.Now().Add(timeout); time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(poll):
		}
		scans, err := count(dir, "full_scans")
		if err != nil {
			return false, err
		}
		now, err := count(dir, "pages_sharing")
		if err != nil {
			return false, err
		}
		sharing = append(sharing, now)
		if n := len(sharing); n > back && scans >= first+3 && now-sharing[n-1-back] <= now/200 {
			return true, nil
		}
	}
	return false, nil
}

// merged has the kernel merge the containers' pages and measures their memory
// once more.
func merged(ctx context.Context, ids []string, r *atOnceReport) (err error) {
	putBack, err := mergeFast(ksmDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, putBack()) }()
	begin := time.Now()
	settled, err := waitMerged(ctx, ksmDir, mergeTimeout, time.Second)
	if err != nil {
		return err
	}
	m, err := memoryOf(ids)
	r.Merged = &mergedReport{PSSBytes: m.pss, KSMBytes: m.ksm, Ms: ms(time.Since(begin)), Settled: settled}
	return err
}
