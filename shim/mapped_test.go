package shim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

func TestUnmappable(t *testing.T) {
	plain := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	process := func(p specs.Process) *specs.Spec { return &specs.Spec{Process: &p, Linux: &specs.Linux{}} }
	for _, tt := range []struct {
		name     string
		template string
		policy   checkpoint.Policy
		images   int64 // MiB
		spec     *specs.Spec
		want     string // part of the reason
	}{
		{"of a template", "web", checkpoint.PolicyTemplate, 32, plain, ""},
		{"of its own", "", checkpoint.PolicyTemplate, 32, plain, "not from a template"},
		{"to be dumped at a stop", "web", checkpoint.PolicyResume, 32, plain, "policy is resume"},
		{"to be dumped at a reboot", "web", checkpoint.PolicyReboot, 32, plain, "policy is reboot"},
		{"little", "web", checkpoint.PolicyTemplate, 31, plain, "no more than 31 MiB"},
		{"user namespace", "web", checkpoint.PolicyTemplate, 32,
			&specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.UserNamespace}}}}, "user namespace"},
		{"SELinux", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{SelinuxLabel: "system_u:system_r:container_t:s0:c1,c2"}), "SELinux"},
		{"containerd's AppArmor", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{ApparmorProfile: "cri-containerd.apparmor.d"}), ""},
		{"that and SELinux", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{ApparmorProfile: "unconfined", SelinuxLabel: "a:b:c:s0"}), "SELinux"},
		{"AppArmor of its own", "web", checkpoint.PolicyTemplate, 32, process(specs.Process{ApparmorProfile: "strict"}), "AppArmor"},
	} {
		c := newContainer("c")
		c.spec, c.settings.Policy = tt.spec, tt.policy
		m := &checkpoint.Manifest{Template: tt.template, Files: []checkpoint.File{{Path: "checkpoint/pages-1.img", SizeBytes: tt.images << 20}}}
		got := ""
		if err := unmappable(m, c); err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, tt.want) || got != "" && tt.want == "" {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestLayOutMapped: a template whose images cannot be laid out is made all the same, with
// the reason or without any; who gives up has his error.
func TestLayOutMapped(t *testing.T) {
	stage := func() (dir, mapped string) {
		dir = t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, checkpoint.ImageDir), 0o700); err != nil {
			t.Fatal(err)
		}
		return dir, filepath.Join(dir, checkpoint.MappedDir)
	}
	dir, mapped := stage()
	if _, err := layOutMapped(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := criu.OpenMappedMemory(mapped); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "inventory.img") && !strings.Contains(err.Error(), "pstree.img") {
		t.Errorf("images of nothing: %v", err)
	}
	dir, mapped = stage()
	if err := os.WriteFile(mapped, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := layOutMapped(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(mapped); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what could not be made is left: %v", err)
	}
	dir, _ = stage()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errAbandoned)
	if _, err := layOutMapped(ctx, dir); !errors.Is(err, errAbandoned) {
		t.Errorf("given up: %v", err)
	}
}

// TestDeferred: only what somebody else checks, or has checked, or nobody reads, is not
// compared with its checksum before a restore.
func TestDeferred(t *testing.T) {
	image := checkpoint.File{Path: "checkpoint/core-1.img"}
	pages := checkpoint.File{Path: "checkpoint/pages-1.img", Blocks: new(checkpoint.Blocks)}
	left := checkpoint.File{Path: "mapped/pages-1.img"}
	for name, tc := range map[string]struct {
		p    pendingRestore
		want []checkpoint.File
	}{
		"read by CRIU":                {pendingRestore{}, []checkpoint.File{left}},
		"filled by a pager":           {pendingRestore{unverified: true}, []checkpoint.File{pages, left}},
		"mapped first":                {pendingRestore{mapped: new(criu.MappedMemory)}, nil},
		"mapped":                      {pendingRestore{mapped: new(criu.MappedMemory), checked: true}, []checkpoint.File{pages, left}},
		"filled, as not to be mapped": {pendingRestore{unverified: true, unmapped: "damaged"}, []checkpoint.File{pages}},
	} {
		var got []checkpoint.File
		for _, f := range []checkpoint.File{image, pages, left} {
			if tc.p.deferred(f) {
				got = append(got, f)
			}
		}
		if !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
