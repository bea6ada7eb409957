package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

// The codes of refusals are reason codes of events.
const (
	Mismatch     = "mismatch"     // of another container, image or spec
	Incompatible = "incompatible" // this node or spec cannot take it
	Corrupt      = "corrupt"      // not as it was written
	Missing      = "missing"      // gone since it was claimed
	Invalid      = "invalid"      // the request is not acceptable
	CrashLooping = "crash-loop"   // restored before, and died soon
	MemoryLimit  = "memory-limit" // the container may use less than the checkpoint holds
	Aborted      = "aborted"      // the context ended
	Internal     = "internal"     // reading or writing failed
)

// Refusal is the only error of [Prepare]. Code says in one word why.
type Refusal struct {
	Code string
	Err  error
}

func (r *Refusal) Error() string { return fmt.Sprintf("checkpoint refused (%s): %v", r.Code, r.Err) }
func (r *Refusal) Unwrap() error { return r.Err }

// refuse finds the code that fits an error.
func refuse(err error) *Refusal {
	code := Internal
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		code = Aborted
	case errors.Is(err, checkpoint.ErrCorrupt):
		code = Corrupt
	case errors.Is(err, checkpoint.ErrIncompatible):
		code = Incompatible
	case errors.Is(err, checkpoint.ErrInvalid):
		code = Invalid
	case errors.Is(err, checkpoint.ErrNotFound), errors.Is(err, os.ErrNotExist):
		code = Missing
	}
	return &Refusal{Code: code, Err: err}
}

// Request is what is known of the container that is to be created, and the
// checkpoint that was claimed for it.
type Request struct {
	// Dir is the claimed checkpoint's directory, Manifest its manifest, already
	// validated.
	Dir      string
	Manifest *checkpoint.Manifest
	// Verify reads the checkpoint as a whole and compares sizes and checksums, but
	// for memory that is checked when it is read.
	Verify func(context.Context) error

	// The live container.
	Identity    checkpoint.Identity
	ImageDigest string
	Spec        *specs.Spec
	// Fingerprint is of the spec as it was before anything of it was adapted
	// to stasis; nil takes that of Spec.
	Fingerprint checkpoint.Fingerprint
	Settings    checkpoint.Settings
	Hostname    string // of the pod; empty leaves the recorded one
	Host        checkpoint.Host
	SwapBytes   int64 // that the node has; 0 where none may be used
	CanMerge    bool  // the node's kernel can merge pages, see [criu.CanMerge]
	// Mapped is how memory is to be mapped from the claimed files; nil for none.
	Mapped *criu.MappedMemory

	// MinUptime is how long a restored container must have lived before it was
	// dumped again, see [CrashLoop]; 0 accepts all.
	MinUptime time.Duration
	// ImageDir is a directory to be made for the images of this restore, where
	// nothing is yet. The caller removes it in the end, after a refusal too.
	ImageDir string
	// TmpfsDir is a directory in which the small tmpfs may be made that CRIU is given;
	// empty leaves them to CRIU.
	TmpfsDir string
}

// Plan is how to restore.
type Plan struct {
	// ImageDir holds the images for runc.
	ImageDir string
	// RootfsDiff is the file with the writable layer, empty without one.
	RootfsDiff string
	Volumes    []Volume
	// Tmpfs are to be mounted and filled before CRIU starts, where CRIU.External says.
	Tmpfs []criu.Tmpfs
	// CRIU is for the configuration file of the restore.
	CRIU criu.ConfigOptions
	// VerifyWait is for how long everything else had to wait for Verify.
	VerifyWait time.Duration
}

// Volume is a memory-backed mount whose content is to be made again.
type Volume struct {
	Destination string      // in the container
	Mount       specs.Mount // of the live spec
	File        string      // layer file, absolute
}

// Prepare checks that a claimed checkpoint fits the container and node, in
// this order: settings, identity, image digest, fingerprint of the spec, crash
// loop, memory limit, host, volumes, the checkpoint's files, and the rights of its tasks
// against the spec. Then it makes the image directory and writes into it what
// this restore is to do otherwise: the pod's host name, which tmpfs are given to
// CRIU, whether memory is merged, and what of it is mapped. Its error is a *[Refusal].
func Prepare(ctx context.Context, r Request) (*Plan, error) {
	p, err := prepare(ctx, r)
	if err == nil {
		return p, nil
	}
	var refusal *Refusal
	if !errors.As(err, &refusal) {
		refusal = refuse(err)
	}
	return nil, refusal
}

func prepare(ctx context.Context, r Request) (*Plan, error) {
	m := r.Manifest
	if m == nil || r.Spec == nil || r.Verify == nil || r.ImageDir == "" {
		return nil, fmt.Errorf("restore: incomplete request: %w", checkpoint.ErrInvalid)
	}
	if !r.Settings.OptedIn() {
		return nil, fmt.Errorf("policy is %q: %w", r.Settings.Policy, checkpoint.ErrInvalid)
	}
	if err := r.match(); err != nil {
		return nil, &Refusal{Code: Mismatch, Err: err}
	}
	if CrashLoop(m, r.MinUptime) {
		return nil, &Refusal{Code: CrashLooping, Err: fmt.Errorf("dumped %d ms after its restore from %s, less than %v", m.UptimeMillis, m.RestoredFrom, r.MinUptime)}
	}
	if err := r.checkMemory(); err != nil {
		return nil, err
	}
	if err := criu.CheckHost(m.Host, r.Host); err != nil {
		return nil, fmt.Errorf("host: %w", err)
	}
	plan := &Plan{ImageDir: r.ImageDir}
	for _, f := range m.Files {
		if f.Path == checkpoint.RootfsDiffFile {
			plan.RootfsDiff = filepath.Join(r.Dir, checkpoint.RootfsDiffFile)
		}
	}
	for _, v := range m.Volumes {
		mount, ok := mountAt(r.Spec, v.Destination)
		if !ok {
			return nil, &Refusal{Code: Mismatch, Err: fmt.Errorf("volume %s is not in the spec", v.Destination)}
		}
		plan.Volumes = append(plan.Volumes, Volume{Destination: v.Destination, Mount: mount, File: filepath.Join(r.Dir, filepath.FromSlash(v.File))})
	}
	// The checksums are compared beside what follows, which expects the worst of
	// every file in any case. That a file is damaged explains more than what comes
	// of it.
	verified := make(chan error, 1)
	go func() { verified <- r.Verify(ctx) }()
	err := r.lay(ctx, plan)
	begin := time.Now()
	if verr := <-verified; verr != nil {
		return nil, fmt.Errorf("verify: %w", verr)
	}
	plan.VerifyWait = time.Since(begin)
	return plan, err
}

// lay checks the images against the spec, and lays out what CRIU is to read.
func (r *Request) lay(ctx context.Context, plan *Plan) error {
	m, images := r.Manifest, filepath.Join(r.Dir, checkpoint.ImageDir)
	if err := criu.CheckAgainstSpec(images, r.Spec); err != nil {
		return err
	}
	inv, err := criu.ReadInventory(images)
	if err != nil {
		return err
	}
	// What was dumped without its connections cannot be restored with them;
	// the other way round it can.
	tcp := r.Settings.TCP
	if inv.TCPClose {
		tcp = checkpoint.TCPClose
	}
	plan.CRIU = criu.RestoreOptions(tcp, false)
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := criu.LinkImages(images, r.ImageDir); err != nil {
		return err
	}
	if r.Mapped == nil { // else they were when its images were laid out
		if err := criu.RearmTimers(images, r.ImageDir); err != nil {
			return err
		}
	}
	// The processes of a user namespace would own what is in them; and the path goes
	// into a configuration file.
	if r.TmpfsDir != "" && !HasUserNamespace(r.Spec) && !strings.ContainsAny(r.TmpfsDir, " \t\n#\"'\\[]") {
		if plan.Tmpfs, err = criu.TakeTmpfs(images, r.ImageDir); err != nil {
			return err
		}
		plan.CRIU.External = map[string]string{}
		for _, t := range plan.Tmpfs {
			plan.CRIU.External[t.Key] = filepath.Join(r.TmpfsDir, t.Key)
		}
	}
	// A clone offers its memory for merging if its own pod wants that, whatever
	// the source did; what goes on from a checkpoint of its own is as it was.
	// Where there is no merging CRIU would fail.
	merge := m.Template != "" && r.Settings.Merge && r.CanMerge
	if m.Template != "" || !r.CanMerge {
		if err := criu.SetMergeable(images, r.ImageDir, merge); err != nil {
			return err
		}
	}
	if r.Mapped != nil {
		if err := r.Mapped.Use(r.ImageDir, merge); err != nil {
			return err
		}
	}
	if r.Hostname != "" {
		if err := criu.RewriteHostname(r.ImageDir, r.Hostname); err != nil {
			return err
		}
	}
	return nil
}

// match compares what names the container: a difference is no fault, but a
// reason to start cold.
func (r *Request) match() error {
	m := r.Manifest
	switch {
	case m.Template != "":
		// Any container of the namespace may begin from it that asks for it.
		if m.Template != r.Settings.Template || m.Identity.Namespace != r.Identity.Namespace {
			return fmt.Errorf("template: the checkpoint is template %q of namespace %q, the container asks for %q in %q",
				m.Template, m.Identity.Namespace, r.Settings.Template, r.Identity.Namespace)
		}
	case m.Identity != r.Identity:
		return fmt.Errorf("identity: the checkpoint is of %s, the container is %s", m.Identity, r.Identity)
	}
	if m.ImageDigest == "" || m.ImageDigest != r.ImageDigest {
		return fmt.Errorf("image digest: the checkpoint is of %q, the container is of %q", m.ImageDigest, r.ImageDigest)
	}
	if len(m.Fingerprint) == 0 {
		return errors.New("fingerprint: the checkpoint has none")
	}
	live := r.Fingerprint
	if live == nil {
		live = checkpoint.ComputeFingerprint(r.Spec)
	}
	if diff := m.Fingerprint.Diff(live); len(diff) > 0 {
		return fmt.Errorf("spec: differs in %s", strings.Join(diff, ", "))
	}
	return nil
}

// HasUserNamespace tells whether a container has users of its own.
func HasUserNamespace(s *specs.Spec) bool {
	return s.Linux != nil && slices.ContainsFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UserNamespace })
}

func mountAt(s *specs.Spec, destination string) (specs.Mount, bool) {
	for _, m := range s.Mounts {
		if path.Clean(m.Destination) == destination {
			return m, true
		}
	}
	return specs.Mount{}, false
}

// CrashLoop tells whether the dumped container had itself been restored and
// lived less than minUptime since: restoring it again would only bring back
// what made it stop.
func CrashLoop(m *checkpoint.Manifest, minUptime time.Duration) bool {
	return m.RestoredFrom != "" && minUptime > 0 && time.Duration(m.UptimeMillis)*time.Millisecond < minUptime
}
