package restore

import (
	"context"
	"errors"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// TestMemoryLimit: a checkpoint of 100 KiB of pages is refused, before it is
// read, where the container may not use as much.
func TestMemoryLimit(t *testing.T) {
	const kib = 1 << 10
	bytes := func(n int64) *int64 { return &n }
	for name, tc := range map[string]struct {
		memory  *specs.LinuxMemory
		node    int64 // swap
		refused bool
	}{
		"no limits":         {nil, 0, false},
		"no limit":          {&specs.LinuxMemory{}, 0, false},
		"zero":              {&specs.LinuxMemory{Limit: bytes(0)}, 0, false},
		"unlimited":         {&specs.LinuxMemory{Limit: bytes(-1)}, 0, false},
		"as much":           {&specs.LinuxMemory{Limit: bytes(100 * kib)}, 0, false},
		"less":              {&specs.LinuxMemory{Limit: bytes(96 * kib)}, 0, true},
		"less, and no swap": {&specs.LinuxMemory{Limit: bytes(96 * kib), Swap: bytes(-1)}, 0, true},
		"any swap":          {&specs.LinuxMemory{Limit: bytes(96 * kib), Swap: bytes(-1)}, 4 * kib, false},
		"swap not limited":  {&specs.LinuxMemory{Limit: bytes(96 * kib)}, 4 * kib, false},
		"swap forbidden":    {&specs.LinuxMemory{Limit: bytes(96 * kib), Swap: bytes(96 * kib)}, 1 << 40, true},
		"too little swap":   {&specs.LinuxMemory{Limit: bytes(90 * kib), Swap: bytes(98 * kib)}, 1 << 40, true},
		"enough swap":       {&specs.LinuxMemory{Limit: bytes(90 * kib), Swap: bytes(100 * kib)}, 1 << 40, false},
		"more than there":   {&specs.LinuxMemory{Limit: bytes(90 * kib), Swap: bytes(100 * kib)}, 8 * kib, true},
	} {
		for what, template := range map[string]string{"checkpoint": "", "template": "shop"} {
			t.Run(name+", "+what, func(t *testing.T) {
				r := newRequest(t)
				r.Manifest.Template, r.Settings.Template = template, template
				r.Manifest.Files = append(r.Manifest.Files,
					checkpoint.File{Path: "checkpoint/pages-1.img", SizeBytes: 60 * kib}, checkpoint.File{Path: "checkpoint/pages-2.img", SizeBytes: 40 * kib},
					checkpoint.File{Path: "checkpoint/pagemap-1.img", SizeBytes: kib}, checkpoint.File{Path: "volumes/pages-1.img", SizeBytes: kib})
				r.SwapBytes = tc.node
				r.Spec.Linux.Resources = &specs.LinuxResources{Memory: tc.memory}
				r.Fingerprint = r.Manifest.Fingerprint // limits are no part of it
				verified := false
				r.Verify = func(context.Context) error { verified = true; return nil }
				_, err := Prepare(context.Background(), *r)
				if !tc.refused {
					if err != nil {
						t.Error(err)
					}
					return
				}
				var refusal *Refusal
				if !errors.As(err, &refusal) || refusal.Code != MemoryLimit || verified || !strings.Contains(err.Error(), "the "+what+" holds 100 KiB") {
					t.Errorf("error %v, verified %v", err, verified)
				}
			})
		}
	}
}
